"""The shape of a BiGRU student; importing this module makes AutoConfig know it."""

from transformers import AutoConfig, PreTrainedConfig


class BiGRUConfig(PreTrainedConfig):
    """Shape of a BiGRU encoder. `hidden_size` is the width of one direction; the sentence state has twice that."""

    model_type = "kdtrain_bigru"

    vocab_size: int = 5000
    hidden_size: int = 320
    num_hidden_layers: int = 3
    max_position_embeddings: int = 512
    hidden_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2


AutoConfig.register(BiGRUConfig.model_type, BiGRUConfig, exist_ok=True)
