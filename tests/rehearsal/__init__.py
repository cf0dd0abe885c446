"""The CUDA path rehearsed without a GPU: published models at their true sizes on fake devices, counted and checked."""
