"""Tiny local models of the kinds the tasks use, made from configs: no network, nothing trained.

Each ``build_*`` writes a model with random weights (always the same ones) and its tokenizer or
processor into a folder that ``from_pretrained`` takes, and returns the folder. They write
nonsense; what they share with the real ones is the code that runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT = """
a cat sat on the mat while one dog ran under blue sky and red sun over green grass with
old man in hat near big house by sea two birds fly high small boat sails far away at dawn
"""
WORDS = tuple(TEXT.split())
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LLAMA_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
SIDE = 24  # pixels of the tiny pictures' sides


def llama_vocabulary() -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys((*LLAMA_SPECIAL, *WORDS)))}


def bert_vocabulary() -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys((*BERT_SPECIAL, *WORDS)))}


def build_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A decoder-only language model of two layers; ``changes`` go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = llama_vocabulary()
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    _save(lambda: LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})), folder, seed)
    _word_tokenizer(vocabulary).save_pretrained(folder)
    return folder


def build_t5(folder: Path, *, seed: int = 0) -> Path:
    """An encoder and decoder model of two layers each."""
    from transformers import T5Config, T5ForConditionalGeneration

    vocabulary = llama_vocabulary()
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    _save(lambda: T5ForConditionalGeneration(config), folder, seed)
    _word_tokenizer(vocabulary).save_pretrained(folder)
    return folder


def build_bert(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """An encoder of two layers; ``changes`` go into its config."""
    from transformers import BertConfig, BertModel

    sizes = {
        "vocab_size": len(bert_vocabulary()),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    _save(lambda: BertModel(BertConfig(**{**sizes, **changes})), folder, seed)
    _bert_tokenizer().save_pretrained(folder)
    return folder


def build_blip(folder: Path, *, seed: int = 0) -> Path:
    """A BLIP for captions: pictures of 24 x 24 in patches of 8, a text decoder of two layers."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    vocabulary = bert_vocabulary()
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 64,
    }
    text = {
        **small,
        "vocab_size": len(vocabulary),
        "encoder_hidden_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": vocabulary["[CLS]"],
        "eos_token_id": vocabulary["[MASK]"],  # as in the real one it is not what ends a caption
        "pad_token_id": vocabulary["[PAD]"],
        "sep_token_id": vocabulary["[SEP]"],
    }
    vision = {**small, "image_size": SIDE, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=64)
    _save(lambda: BlipForConditionalGeneration(config), folder, seed)
    BlipProcessor(_image_processor(), _bert_tokenizer()).save_pretrained(folder)
    return folder


def build_blip2(folder: Path, *, seed: int = 0) -> Path:
    """A BLIP-2 with a tiny OPT as its language model and four query tokens."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    vocabulary = llama_vocabulary()
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = Blip2VisionConfig(**small, intermediate_size=128, image_size=SIDE, patch_size=8)
    qformer = Blip2QFormerConfig(
        **small, intermediate_size=128, encoder_hidden_size=64, vocab_size=len(vocabulary)
    )
    text = OPTConfig(
        **small,
        ffn_dim=128,
        word_embed_proj_dim=64,
        tie_word_embeddings=False,  # tied random ones say the same word again and again
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=4,
        image_text_hidden_size=64,
        image_token_index=vocabulary["<image>"],
    )
    _save(lambda: Blip2ForConditionalGeneration(config), folder, seed)
    processor = Blip2Processor(_image_processor(), _word_tokenizer(vocabulary), num_query_tokens=4)
    processor.save_pretrained(folder)
    return folder


def tiny_picture(seed: int = 0) -> Any:
    """A PIL picture of 40 x 30 pixels, another for each seed."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (3, 4, 3), generator=generator, dtype=torch.uint8)
    picture = Image.frombytes("RGB", (4, 3), bytes(coarse.permute(1, 2, 0).flatten().tolist()))
    return picture.resize((40, 30), Image.Resampling.BILINEAR)


def _save(build: Callable[[], Any], folder: Path, seed: int) -> None:
    # The caller's random numbers go on as if nothing had been drawn here.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # far enough apart for distinct answers
                    parameter.normal_(0, 0.2)
        model.eval().save_pretrained(folder)


def _word_tokenizer(vocabulary: dict[str, int]) -> Any:
    """One token a word, padded on the left as a batch of prompts must be."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(copy.copy(vocabulary), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=64,
    )


def _bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    return BertTokenizer(vocab=bert_vocabulary(), model_max_length=64)


def _image_processor() -> Any:
    from transformers import BlipImageProcessor

    return BlipImageProcessor(size={"height": SIDE, "width": SIDE})
