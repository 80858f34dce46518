"""Language tasks: captions of pictures, vectors of sentences, continued texts.

Each takes one input or a list of them, and answers in kind: one answer, or a list in the same
order. The classes are short because all they say is what differs from one model to another::

    class MyCaptioner(Blip1):
        NAME = "my-captioner"
        MODEL_ID = "/models/my-blip"

    captions = MyCaptioner()(input_raw=[picture, another])
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from opguard.base import OpGuardBase
from opguard.tasks._checks import pictures
from opguard.tasks._generating import Generation, Sequences, check_settings, generate
from opguard.tasks._late import Late
from opguard.tasks._processors import load_processor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Blip",
    "Blip1",
    "Blip2",
    "Blip2_4Bit",
    "Blip2_8Bit",
    "Blip2_16Bit",
    "Blip2_32Bit",
    "Embedding",
    "Generation",
    "TextGeneration",
]


class _OneOrMany(OpGuardBase):
    """Makes a list of a single input, and a single answer of its list."""

    PROCESSOR_TYPE: ClassVar[Any]

    def _load_processor(self) -> Any:
        owner = type(self).__name__
        return load_processor(owner, self.PROCESSOR_TYPE, self.model_id, self.REVISION)

    def _caller(self, *, input_raw: Any, **kwargs: Any) -> Any:
        if not isinstance(input_raw, list | tuple):
            return super()._caller(input_raw=[input_raw], **kwargs)[0]
        if not input_raw:
            raise ValueError(
                f"{type(self).__name__}: expected one input or several, got an empty "
                f"{type(input_raw).__name__} as input_raw; leave the call out"
            )
        return super()._caller(input_raw=list(input_raw), **kwargs)

    def _tokenized(self, texts: list[str], **how: Any) -> Any:
        """Returns the tokens of texts on the cpu; TypeError for what is no text."""
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"{type(self).__name__}: expected input_raw= a text or a list of texts, got "
                    f"{type(text).__name__} as number {at}; make it a str"
                )
        return self.processor(texts, padding=True, return_tensors="pt", **how)

    def _without_tokens(self, tokens: Any) -> list[int]:
        """Returns which of the texts became no token at all."""
        found = tokens["attention_mask"].bool().any(1).tolist()
        return [at for at, some in enumerate(found) if not some]

    def _need_tokens(self, texts: list[str], empty: list[int]) -> None:
        if empty:
            raise ValueError(
                f"{type(self).__name__}: expected texts of a token at least as input_raw=, got "
                f"{texts[empty[0]]!r:.80} as number {empty[0]}; begin it with a word"
            )


class Blip(_OneOrMany):
    """Captions of pictures; subclasses say which model::

        caption = Blip1()(input_raw=picture)

    Call keywords:
        input_raw: a PIL picture or a list of them, of any sizes.
        text: how every caption is to begin; None leaves that to the model.
        max_new_tokens, num_beams: the captions' longest length, and how many ways are followed.
        details: True returns a `Generation` for each picture in place of its caption.

    Returns a caption, or a list of captions in the pictures' order. A picture whose numbers turn
    into NaN has its caption cut there, with a WARNING that says which; the others' are complete.
    """

    def _preprocess(self, *, input_raw: list[Image], text: str | None = None) -> Any:
        if not isinstance(text, str | None):
            raise TypeError(
                f"{type(self).__name__}: expected text to be one string for all pictures or None, "
                f"got {type(text).__name__}; call once for each text"
            )
        pictures(type(self).__name__, "input_raw", input_raw)
        texts = {} if text is None else {"text": [text] * len(input_raw)}
        inputs = self.processor(images=input_raw, return_tensors="pt", **texts)
        return inputs.to(self.device, self.dtype)

    def _predict(
        self, *, input_proc: Any, max_new_tokens: int = 32, num_beams: int = 1
    ) -> Sequences:
        return generate(
            self.detector,
            input_proc,
            decoder=self._decoder(),
            ends=self._end_token(),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
        )

    def _postprocess(self, *, output_raw: Sequences, details: bool = False) -> list[Any]:
        captions = output_raw.read(self._text, prompt=True)
        return captions if details else [caption.text for caption in captions]

    def _decoder(self) -> Any:
        """The part of the model that writes."""
        raise NotImplementedError

    def _end_token(self) -> int | None:
        """The token that ends a caption; None for the one the decoder's own settings name."""
        return None

    def _text(self, tokens: Any) -> str:
        return str(self.processor.decode(tokens, skip_special_tokens=True)).strip()

    def example_inputs(self) -> dict[str, Any]:
        from PIL import Image

        return {"input_raw": Image.linear_gradient("L").convert("RGB"), "max_new_tokens": 8}


class Blip1(Blip):
    """BLIP, a small captioner (0.25 billion parameters)."""

    NAME = "blip-image-captioning-base"
    MODEL_ID = "Salesforce/blip-image-captioning-base"
    # The commit with the hub's own conversion to safetensors, which main does not have.
    REVISION = "9cfcdbcaccbcadb2b53b36d4b50042c4eeaa0c25"
    DETECTOR_TYPE = Late("transformers", "BlipForConditionalGeneration", extra="hf")
    PROCESSOR_TYPE = Late("transformers", "BlipProcessor", extra="hf")

    def _decoder(self) -> Any:
        return self.detector.text_decoder

    def _end_token(self) -> int:
        return int(self.detector.config.text_config.sep_token_id)  # not its eos_token_id


class Blip2(Blip):
    """BLIP-2: a picture's features put before the prompt of a language model (3.7 billion)."""

    NAME = "blip2-opt-2.7b"
    MODEL_ID = "Salesforce/blip2-opt-2.7b"
    REVISION = "main"
    DETECTOR_TYPE = Late("transformers", "Blip2ForConditionalGeneration", extra="hf")
    PROCESSOR_TYPE = Late("transformers", "Blip2Processor", extra="hf")

    def _decoder(self) -> Any:
        return self.detector.language_model


class Blip2_32Bit(Blip2):
    """BLIP-2 in float32, 15 GB."""

    NAME = "blip2-opt-2.7b-32bit"
    DTYPE_PREFERENCE = torch.float32


class Blip2_16Bit(Blip2):
    """BLIP-2 in float16, 7.5 GB."""

    NAME = "blip2-opt-2.7b-16bit"
    DTYPE_PREFERENCE = torch.float16


class Blip2_8Bit(Blip2):
    """BLIP-2 with weights of 8 bits, 4 GB."""

    NAME = "blip2-opt-2.7b-8bit"
    DEFAULT_QUANT_TYPE = "i8"


class Blip2_4Bit(Blip2):
    """BLIP-2 with weights of 4 bits in the NF4 format, 2.5 GB."""

    NAME = "blip2-opt-2.7b-4bit"
    DEFAULT_QUANT_TYPE = "nf4"


class Embedding(_OneOrMany):
    """Vectors of sentences, near to each other where the meanings are::

        vectors = Embedding()(input_raw=["a cat", "a kitten"])
        similarity = vectors @ vectors.T

    A vector is the mean of the vectors of its sentence's tokens, scaled to the length 1. A string
    gives a float32 tensor (width,) on the CPU, a list gives (sentences, width). Sentences are cut
    after ``MAX_TOKENS`` tokens, or where the model's positions end. Raises ValueError for a
    sentence of no token.
    """

    NAME = "all-minilm-l6-v2"
    MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
    REVISION = "main"
    DETECTOR_TYPE = Late("transformers", "AutoModel", extra="hf")
    PROCESSOR_TYPE = Late("transformers", "AutoTokenizer", extra="hf")
    DTYPE_PREFERENCE = torch.float32  # so small that half precision saves little

    MAX_TOKENS: ClassVar[int | None] = 256  # what the model was made for; None: what it can take

    def _preprocess(self, *, input_raw: list[str]) -> Any:
        limits = [self.MAX_TOKENS, self.processor.model_max_length]
        # Not every tokenizer was told how many positions its model has.
        limits.append(self._positions())
        limit = min(each for each in (*limits, sys.maxsize) if each and each > 0)
        tokens = self._tokenized(input_raw, truncation=True, max_length=limit)
        self._need_tokens(input_raw, self._without_tokens(tokens))
        return tokens.to(self.device)

    def _positions(self) -> int | None:
        """Returns how many tokens the model has positions for, None where it does not say."""
        for name, part in self.detector.named_modules():
            behind = getattr(part, "padding_idx", None)
            if name.endswith("position_embeddings") and behind is not None:
                # As in RoBERTa, positions are counted from behind the one for padding.
                return int(part.num_embeddings) - int(behind) - 1
        found: int | None = getattr(self.detector.config, "max_position_embeddings", None)
        return found

    def _predict(self, *, input_proc: Any) -> torch.Tensor:
        states = self.detector(**input_proc).last_hidden_state.float()  # (sentences, tokens, width)
        mask = input_proc["attention_mask"].unsqueeze(-1)
        # Not by multiplication: a padded place may hold anything, and NaN times 0 is NaN.
        total = states.masked_fill(mask == 0, 0).sum(1)
        return torch.nn.functional.normalize(total / mask.sum(1).clamp(min=1), dim=1)

    def example_inputs(self) -> dict[str, Any]:
        return {"input_raw": ["A cat sleeps by the window.", "Interest rates rose again."]}


class TextGeneration(_OneOrMany):
    """Continues prompts; a prompt whose numbers break ends alone::

        for each in TextGeneration()(input_raw=["Once upon", "The sea"], max_new_tokens=20):
            print(each.text, each.finish_reason)

    Call keywords:
        input_raw: a prompt or a list of prompts, of any lengths; of one without a token the model
            gets the token that begins texts, where its tokenizer has one.
        max_new_tokens: the longest length of what follows a prompt, in tokens.
        do_sample, temperature, top_k, top_p: draw the tokens, instead of taking the likeliest.
        num_beams, num_return_sequences: ways followed at once, and answers for each prompt.
        settings: further keywords of transformers' ``generate``, such as
            ``{"repetition_penalty": 1.2}``.

    Returns a `Generation` for each prompt, or a list of them where ``num_return_sequences`` is
    more than 1. A step whose logits are NaN or infinite ends its own sequence with the
    ``finish_reason`` "nonfinite"; the others get, bit for bit, what they get beside a sound one.
    (Not so with bitsandbytes' 8 bits, whose rounding of one sequence depends on all of its batch.)
    """

    NAME = "smollm2-135m"
    MODEL_ID = "HuggingFaceTB/SmolLM2-135M"
    REVISION = "main"
    DETECTOR_TYPE = Late("transformers", "AutoModelForCausalLM", extra="hf")
    PROCESSOR_TYPE = Late("transformers", "AutoTokenizer", extra="hf")

    def _load_processor(self) -> Any:
        tokenizer = super()._load_processor()
        tokenizer.padding_side = "left"  # what follows a prompt stands right behind it
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _preprocess(self, *, input_raw: list[str]) -> Any:
        tokens = self._tokenized(input_raw, return_token_type_ids=False)
        if empty := self._without_tokens(tokens):
            begin = self.processor.bos_token
            if begin is not None:  # nothing, as the model knows it
                texts = [begin if at in empty else text for at, text in enumerate(input_raw)]
                tokens = self._tokenized(texts, return_token_type_ids=False)
                empty = self._without_tokens(tokens)
            self._need_tokens(input_raw, empty)
        return tokens.to(self.device)

    def _predict(
        self,
        *,
        input_proc: Any,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> Sequences:
        check_settings(settings)
        ways = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        drawing: dict[str, Any] = {name: ways[name] for name in ways if ways[name] is not None}
        if drawing and not do_sample:
            raise ValueError(
                f"{', '.join(drawing)}: expected do_sample=True beside what says how to draw, got "
                f"False; set it, or leave {' and '.join(drawing)} out"
            )
        return generate(
            self.detector,
            input_proc,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            do_sample=do_sample,
            pad_token_id=self.processor.pad_token_id,
            **drawing,
            **(settings or {}),
        )

    def _postprocess(self, *, output_raw: Sequences, num_return_sequences: int = 1) -> list[Any]:
        texts = output_raw.read(self._text, prompt=False)
        if num_return_sequences == 1:
            return texts
        count = num_return_sequences
        return [texts[at : at + count] for at in range(0, len(texts), count)]

    def _text(self, tokens: Any) -> str:
        return str(self.processor.decode(tokens, skip_special_tokens=True))

    def example_inputs(self) -> dict[str, Any]:
        return {"input_raw": ["Once upon a time", "The sea"], "max_new_tokens": 8}
