"""Small random stand-ins for what diffusers' tests take from the Hub: tokenizers and text encoders.

Only in the process of a check: what is replaced there, nobody else sees.
"""

from __future__ import annotations

from functools import partial
from typing import Any

WORDS = 900  # w0, w1, ...: prompts of these words differ in their tokens
SPECIAL = ("<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "<bos>")
TOKENIZERS = (
    "AutoTokenizer", "ByT5Tokenizer", "CLIPTokenizer", "CLIPTokenizerFast", "GemmaTokenizer",
    "GemmaTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast",
    "Qwen2Tokenizer", "Qwen2TokenizerFast", "T5Tokenizer", "T5TokenizerFast",
)  # fmt: skip
ENCODERS = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "Gemma2Model", "GemmaModel", "T5EncoderModel",
    "UMT5EncoderModel",
)  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {  # models that the tests take whole, as small as fits them
    "BertModel": {
        "vocab_size": 1103, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "LlamaForCausalLM": {
        "vocab_size": 1103, "hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {
            "vocab_size": 1103, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 1102,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {
            "vocab_size": 152064, "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": {
            "vocab_size": 152064, "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16, "deepstack_visual_indexes": [0],
        },
    },
    "SiglipVisionModel": {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 30, "patch_size": 2,
    },
}  # fmt: skip
VISION = {  # tokens of Qwen's language models that stand for pictures, by their numbers there
    "<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655, "<|video_pad|>": 151656,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}{{ m['content'] if m['content'] is string else 'w1 w2' }} {% endfor %}"
)


def put_in_place() -> None:
    """From now on ``from_pretrained`` of text parts gives small random ones in this process."""
    import transformers

    for name in TOKENIZERS:
        cls = getattr(transformers, name, None)
        if cls is not None:
            cls.from_pretrained = classmethod(_tokenizer)
    transformers.AutoConfig.from_pretrained = classmethod(lambda cls, name, *a, **k: _config(name))
    for name in ENCODERS:
        cls = getattr(transformers, name, None)
        if cls is not None:
            cls.from_pretrained = classmethod(_encoder)
    for name in WHOLE:
        cls = getattr(transformers, name, None)
        if cls is not None:
            cls.from_pretrained = classmethod(_whole)
    for name in ("Qwen2VLProcessor", "Qwen3VLProcessor"):
        getattr(transformers, name).from_pretrained = classmethod(_processor)
    transformers.AutoProcessor.from_pretrained = partial(_processor, transformers.Qwen2VLProcessor)
    transformers.SiglipImageProcessor.from_pretrained = classmethod(
        lambda cls, name, *a, **settings: cls(**settings)
    )


def _whole(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """A model of random weights, small."""
    import torch

    torch.manual_seed(0)
    return cls(cls.config_class(**WHOLE[cls.__name__])).eval()


def _processor(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Pictures as Qwen's processor makes them, words as the stand-in does."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    words = _tokenizer(cls, name)
    third = cls.__name__.startswith("Qwen3")
    return cls(
        image_processor=Qwen2VLImageProcessor(
            min_pixels=28 * 28, max_pixels=56 * 56, patch_size=16 if third else 14
        ),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor() if third else Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


def _tokenizer(cls: type, name: str, *args: Any, **kwargs: Any) -> Any:
    """Words by their place in a list, whatever class was asked for."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    if "Processor" in cls.__name__:  # which some take for as long as it is
        first = min(VISION.values())
        vocabulary |= {f"v{number}": number for number in range(len(vocabulary), first)}
    vocabulary |= VISION
    words = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        bos_token="<s>", model_max_length=77, additional_special_tokens=list(VISION),
    )  # fmt: skip
    made.chat_template = CHAT
    return made


def _config(name: Any) -> Any:
    """The sizes that the tests expect of the Hub's smallest models."""
    from transformers import CLIPTextConfig, GemmaConfig, T5Config

    if "clip" in str(name).lower():
        return CLIPTextConfig(
            vocab_size=1000, hidden_size=32, intermediate_size=37, num_hidden_layers=5,
            num_attention_heads=4, eos_token_id=1, bos_token_id=0, pad_token_id=0,
            projection_dim=32,
        )  # fmt: skip
    if "gemma" in str(name).lower():
        return GemmaConfig(
            vocab_size=1000, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        )  # fmt: skip
    return T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4)


def _encoder(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    word = next((w for w in ("CLIP", "Gemma") if w in cls.__name__), name)
    sizes = _config(word).to_dict()
    kind = cls.config_class
    return cls(kind.from_dict({**sizes, "model_type": kind.model_type})).eval()
