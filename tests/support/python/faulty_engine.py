"""The sidecar with an engine that fails to load any model."""

from starweave_image.__main__ import main
from starweave_image.engine.engine import Engine


def load_model(engine, id, model):
    return 1 / 0


Engine.load_model = load_model
main()
