"""One config, composed of the settings of all packages and read from YAML."""

from kd_pipeline.config.config import Config, load_config

__all__ = ["Config", "load_config"]
