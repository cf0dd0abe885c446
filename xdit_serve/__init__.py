"""xdit-serve: the programs' models behind the video API that OpenAI's client speaks."""
