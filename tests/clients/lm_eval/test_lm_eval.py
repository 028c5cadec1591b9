"""lm-evaluation-harness through /v1/completions: its scores are those of the engine asked directly."""

import math
import os
import re

import lm_eval
import pytest
import requests
from lm_eval.tasks import TaskManager

from scorer import Scorer

URL = os.environ["TEST_URL"]
TASKS = ["kitchen", "turns", "tales", "counting"]
MAX_LENGTH = 66
"""Short, so that the longest tale wants two windows."""
WINDOW = MAX_LENGTH - 2
"""lm-evaluation-harness keeps a token for the answer, and one for the prefix."""

TOLERANCE = 1e-3
"""Nats a text. The server reads a text in one piece and the scorer token by token after cached prefixes."""

WAYS = {
    "one by one": {},
    "at once": {"num_concurrent": 4},
    "batches": {"batch_size": 3},
}
"""Each is a shape of requests: a list of token ids, several such requests at once, lists of lists."""


@pytest.fixture(scope="session")
def scorer():
    scorer = Scorer(os.environ["TEST_SCORER"], os.environ["TEST_MODEL"])
    yield scorer
    scorer.close()


@pytest.fixture(scope="session", params=WAYS.values(), ids=WAYS)
def evaluation(request):
    """All tasks, run as `lm-eval run --model local-completions --model_args base_url=…` runs them."""
    arguments = {"model": "", "base_url": f"{URL}/v1/completions", "max_length": MAX_LENGTH, "max_retries": 1}
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments | request.param,
        tasks=TASKS,
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        bootstrap_iters=0,
    )


def metric(evaluation, task: str, name: str) -> float:
    return evaluation["results"][task][f"{name},none"]


def complete(**body) -> dict:
    answer = requests.post(f"{URL}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("task", ["kitchen", "turns"])
def test_choices_are_as_likely_as_the_engine_says(evaluation, scorer, task):
    samples = evaluation["samples"][task]
    right, right_by_length = [], []
    for sample in samples:
        own = [scorer.likelihood(*pair) for pair in sample["arguments"]]
        for (told,), (score, greedy), pair in zip(sample["resps"], own, sample["arguments"], strict=True):
            assert told[0] == pytest.approx(score, abs=TOLERANCE), pair
            assert told[1] == greedy, pair
        scores = [score for score, _ in own]
        lengths = [len(answer) for answer in sample["doc"]["answers"]]
        right.append(scores.index(max(scores)) == sample["target"])
        per_character = [score / length for score, length in zip(scores, lengths, strict=True)]
        right_by_length.append(per_character.index(max(per_character)) == sample["target"])
    assert metric(evaluation, task, "acc") == pytest.approx(sum(right) / len(samples))
    assert metric(evaluation, task, "acc_norm") == pytest.approx(sum(right_by_length) / len(samples))


def test_choices_differ(scorer, evaluation):
    """What is compared is no list of equal numbers, and both verdicts on greedy decoding occur."""
    told = [told for task in ("kitchen", "turns") for sample in evaluation["samples"][task] for told in sample["filtered_resps"]]
    assert len({round(score, 2) for score, _ in told}) > len(told) // 2
    assert {greedy for _, greedy in told} == {True, False}


def test_texts_are_as_perplexing_as_the_engine_says(evaluation, scorer):
    info = requests.get(f"{URL}/tokenizer_info", timeout=60).json()
    (prefix,) = scorer.tokens(info["bos_token"] or info["eos_token"])
    texts, scores, windows = [], [], []
    for sample in evaluation["samples"]["tales"]:
        text = sample["doc"]["text"]
        texts.append(text)
        scores.append(scorer.rolling(text, prefix, WINDOW))
        windows.append(math.ceil(len(scorer.tokens(text)) / WINDOW))
        ((told,),) = sample["resps"]
        assert told == pytest.approx(scores[-1], abs=TOLERANCE * windows[-1]), text
    assert max(windows) > 1 and min(windows) == 1
    total, words = sum(scores), sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert metric(evaluation, "tales", "word_perplexity") == pytest.approx(math.exp(-total / words), rel=TOLERANCE)
    assert metric(evaluation, "tales", "byte_perplexity") == pytest.approx(math.exp(-total / size), rel=TOLERANCE)
    assert metric(evaluation, "tales", "bits_per_byte") == pytest.approx(-total / size / math.log(2), rel=TOLERANCE)


def test_texts_go_on_as_the_engine_says(evaluation, scorer):
    samples = evaluation["samples"]["counting"]
    right = []
    for sample in samples:
        ((context, settings),) = sample["arguments"]
        own = scorer.greedy(context, settings["max_gen_toks"], settings["until"])
        assert sample["resps"] == [[own]], context
        right.append(own == sample["doc"]["rest"])
    assert metric(evaluation, "counting", "exact_match") == pytest.approx(sum(right) / len(samples))
    assert any(right) and not all(right)


def test_some_answers_are_followed_by_the_end_of_the_turn(evaluation):
    """The case that `turns` is there for: the one token asked for behind the answer has no text."""
    pairs = [pair for sample in evaluation["samples"]["turns"] for pair in sample["arguments"]]
    asked = [complete(prompt=context + answer, max_tokens=1, temperature=0) for context, answer in pairs]
    assert "stop" in [choice["finish_reason"] for choice in asked]


def test_a_text_alone_is_scored_alike(evaluation, scorer):
    """As text, and with no token behind it: `max_tokens: 0`."""
    for sample in evaluation["samples"]["kitchen"]:
        for context, answer in sample["arguments"]:
            choice = complete(prompt=context + answer, max_tokens=0, echo=True, logprobs=0)
            assert choice["text"] == context + answer
            _, start = scorer.pair(context, answer)
            score, _ = scorer.likelihood(context, answer)
            told = sum(choice["logprobs"]["token_logprobs"][start:])
            assert told == pytest.approx(score, abs=TOLERANCE), answer
