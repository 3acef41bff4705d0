"""The shape of a classifier of pairs; importing this module makes AutoConfig know it."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class PairConfig(PreTrainedConfig):
    """A classifier of two texts: one encoder reads both, the head reads both sentence vectors.

    `encoder` is the encoder's own configuration as a dictionary.
    """

    model_type = "kdtrain_pair"

    encoder: dict[str, Any] | None = None
    classifier_dropout: float = 0.1
    initializer_range: float = 0.02

    @property
    def encoder_config(self) -> PreTrainedConfig:
        """The encoder's configuration."""
        settings = dict(self.encoder or {})
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


AutoConfig.register(PairConfig.model_type, PairConfig, exist_ok=True)
