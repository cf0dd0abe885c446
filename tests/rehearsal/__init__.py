"""The CUDA path without a GPU: fake devices (`fake_cuda`), fake groups of any size, recorded (`recorder`)."""
