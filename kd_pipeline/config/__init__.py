"""The config of a run, read from YAML."""

from kd_pipeline.config.config import Config, load_config

__all__ = ["Config", "load_config"]
