"""Image generation with stock diffusers pipelines: a sidecar process of an Elixir application, or on its own."""

__version__ = "0.1.0"
