"""CogVideoX on one or many GPUs: text, image and video to video."""
