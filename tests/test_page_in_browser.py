"""The page of a trace in a real browser: what it computes, shows and says, by mouse and by keys, wide and narrow.

    apt-get install chromium
    python -m pytest -m browser

browser.py drives it without any further package. Where `pip install axe-core-python` has been run as well, its rules of
accessibility are checked too. Numbers are compared with loops over plain floats, from raw log-probabilities and scores.
"""

import importlib.util
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from browser import Browser, browser, program
from test_explain import traced
from toy_trace import HOSTILE, N_EPOCHS, N_SHOWN, SETTINGS, WORDS, recomputed, recomputed_epoch, toy_tensors, toy_trace

import ppo
from page import write_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(program() is None, reason="there is no Chromium here: apt-get install chromium"),
]
SETTLED = "new Promise((done) => setTimeout(done, 300))"  # when colours no longer change
SIZES = {"desk": (1280, 900), "phone": (360, 740), "smallest": (320, 640)}


@pytest.fixture(scope="module")
def trace() -> dict:
    return toy_trace()


@pytest.fixture(scope="module")
def url(trace, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(trace, path)
    return path.as_uri()


@pytest.fixture(scope="module")
def tab(tmp_path_factory) -> Browser:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(tab, url) -> Browser:
    """The page, freshly opened on a desk; what a test does must not raise an error in it."""
    tab.open(url)
    yield tab
    assert complaints(tab) == []


def complaints(tab: Browser) -> list:
    """Errors and warnings since the page was opened."""
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    return [event["params"] for event in tab.events if event["method"] in kinds]


def choose(tab: Browser, row: int, token: int, epoch: int) -> None:
    tab.run(f"choose({{ row: {row}, token: {token}, epoch: {epoch} }})")


def put(tab: Browser, name: str, value: float | str) -> None:
    """As a reader does: an input's value, and that it has changed."""
    kind = "change" if name in ("kl_estimator", "whiten_advantages") else "input"
    tab.run(f"{{ const e = byId('{name}'); e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{kind}')); }}")


def table(tab: Browser) -> list[dict]:
    """The table of all numbers, a row a token, at full precision."""
    cells = "[...row.querySelectorAll('td')].map((td) => [td.dataset.name, td.dataset.value ?? td.textContent])"
    rows = tab.run(f"[...document.querySelectorAll('#table tbody tr')].map((row) => {cells})")
    return [{name: x if name == "now_branch" else float(x) for name, x in row} for row in rows]


def shown(text: str) -> float:
    """A number as the page writes it."""
    mantissa, _, power = text.replace("−", "-").replace("+", "").partition(" × 10")
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    return float(mantissa) * 10 ** int(power.translate(digits) or 0)


def is_shown(text: str, x: float) -> bool:
    """Whether a text is the number, to the four decimals or three digits that are shown."""
    return abs(shown(text) - x) <= max(5.1e-5, 0) if "×" not in text else abs(shown(text) - x) <= 5.1e-3 * abs(x)


# ----------------------------------------------------------------------------------------------------------------
# The numbers, by loops over plain floats
# ----------------------------------------------------------------------------------------------------------------


def by_hand(raw: list[dict], settings: dict) -> list[list[dict]]:
    """Every number of the rollout, from the raw ones: k1 = log π - log ρ and the definitions, the sums written out."""
    rows = []
    for row in raw:
        n, beta, gamma, lam = len(row["value"]), settings["kl_coef"], settings["gamma"], settings["lam"]
        kls = [row["logprob"][t] - row["ref_logprob"][t] for t in range(n)]
        rewards = [-beta * kls[t] + (row["score"] if t == n - 1 else 0) for t in range(n)]
        values = [*row["value"], 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
        gae = [math.fsum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
        names = ("kl", "reward", "td_error", "advantage", "value", "logprob")
        columns = (kls, rewards, deltas, gae, row["value"], row["logprob"])
        rows.append([dict(zip(names, each, strict=True)) for each in zip(*columns, strict=True)])
    everywhere = [token["advantage"] for row in rows for token in row]
    mean = math.fsum(everywhere) / len(everywhere)
    variance = math.fsum((x - mean) ** 2 for x in everywhere) / len(everywhere)
    for token in (token for row in rows for token in row):
        token["whitened"] = (token["advantage"] - mean) / math.sqrt(variance + 1e-8)
        token["return"] = token["advantage"] + token["value"]
    return rows


def epoch_by_hand(token: dict, logprob: float, value: float, settings: dict, n_tokens: int) -> dict:
    ratio, eps, eps_v = math.exp(logprob - token["logprob"]), settings["clip_range"], settings["clip_range_value"]
    surrogate = min(ratio * token["whitened"], min(max(ratio, 1 - eps), 1 + eps) * token["whitened"])
    near = min(max(value, token["value"] - eps_v), token["value"] + eps_v)
    above, below = token["whitened"] > 0 and ratio > 1 + eps, token["whitened"] < 0 and ratio < 1 - eps
    return {
        "now_ratio": ratio,
        "now_policy_loss": -surrogate,
        "now_share": -surrogate / n_tokens,
        "now_value_loss": max((value - token["return"]) ** 2, (near - token["return"]) ** 2) / 2,
        "now_value_change": value - token["value"],
        "now_branch": "clipped above" if above else "clipped below" if below else "unclipped",
    }


def expected(trace: dict, row: int, token: int, epoch: int) -> dict:
    rolled = by_hand(trace["batch"]["raw"], trace["settings"])[row][token]
    new = trace["rows"][row]["epochs"][epoch]["tokens"][token]
    n_tokens = sum(map(len, WORDS))
    return rolled | epoch_by_hand(rolled, new["logprob"], new["value"], trace["settings"], n_tokens)


def test_every_number_of_the_table_is_that_worked_out_by_hand(opened, trace):
    branches = set()
    for row in range(N_SHOWN):
        for epoch in range(N_EPOCHS + 1):
            choose(opened, row, 0, epoch)
            found = table(opened)
            assert len(found) == len(WORDS[row])
            for t, token in enumerate(found):
                for name, x in expected(trace, row, t, epoch).items():
                    assert token[name] == (x if name == "now_branch" else pytest.approx(x, abs=1e-9)), (row, t, name)
                branches.add(token["now_branch"])
    assert branches == {"unclipped", "clipped above", "clipped below"}


RESULTS = {  # of each step's last lines
    "token_logprobs-1": ["logprob", "ref_logprob"],
    "token_entropy-2": ["entropy"],
    "kl_estimate-3": ["kl"],
    "penalise_missing_eos-4": ["score"],
    "shape_scores-5": ["score"],
    "shape_rewards-6": ["reward"],
    "estimate_advantages-7": ["td_error"],
    "estimate_advantages-8": ["advantage"],
    "estimate_returns-9": ["return"],
    "masked_whiten-10": ["whitened"],
    "importance_ratio-11": ["now_ratio"],
    "policy_losses-12": [None, None, "now_policy_loss"],
    "value_losses-13": [None, None, "now_value_loss"],
    "minibatch_loss-14": ["now_share", None, None],
}


def steps(tab: Browser) -> dict[str, list[list[str]]]:
    """Of each step, the numbers of its filled lines, as they are shown."""
    lines = (
        "[...step.querySelectorAll('.filled')].map((f) => [...f.querySelectorAll('.value')].map((v) => v.textContent))"
    )
    found = tab.run(f"[...document.querySelectorAll('.step')].map((step) => [step.dataset.step, {lines}])")
    return dict(found)


@pytest.mark.parametrize("row", range(N_SHOWN))
def test_every_equation_comes_to_the_number_worked_out_by_hand(opened, trace, row):
    for token in range(len(WORDS[row])):
        for epoch in (0, N_EPOCHS):
            choose(opened, row, token, epoch)
            right = expected(trace, row, token, epoch)
            right |= {name: trace["rows"][row]["tokens"][token][name] for name in ("ref_logprob", "entropy")}
            right["score"] = toy_tensors()["scores"][row].item()
            found = steps(opened)
            assert found.keys() == RESULTS.keys()
            for step, names in RESULTS.items():
                assert len(found[step]) == len(names), step
                for name, line in zip(names, found[step], strict=True):
                    assert name is None or is_shown(line[-1], right[name]), (step, line, right[name])


def test_the_numbers_put_into_an_equation_are_its_own(opened, trace):
    """TD error and GAE of a token in the middle, and of the last one, after which there is nothing."""
    tokens = by_hand(trace["batch"]["raw"], SETTINGS)[0]
    for t in (4, len(tokens) - 1):
        after = tokens[t + 1] if t + 1 < len(tokens) else {"value": 0, "advantage": 0}
        choose(opened, 0, t, 0)
        found = steps(opened)
        td_error = [tokens[t]["reward"], SETTINGS["gamma"], after["value"], tokens[t]["value"], tokens[t]["td_error"]]
        gae = [tokens[t]["td_error"], SETTINGS["gamma"], SETTINGS["lam"], after["advantage"], tokens[t]["advantage"]]
        for step, numbers in {"estimate_advantages-7": td_error, "estimate_advantages-8": gae}.items():
            assert len(found[step][0]) == len(numbers)
            assert all(map(is_shown, found[step][0], numbers)), (found[step], numbers)


def test_the_sum_over_later_tokens_comes_to_the_advantage(opened, trace):
    choose(opened, 0, 2, 0)
    opened.run("document.querySelector('[data-step=estimate_advantages-8] details').open = true")
    opened.run("new Promise(requestAnimationFrame)")
    sums = opened.run("[...document.querySelectorAll('.sum tbody tr')].map((row) => row.lastChild.title)")
    assert len(sums) == len(WORDS[0]) - 2 + 1
    assert float(sums[-1]) == pytest.approx(by_hand(trace["batch"]["raw"], SETTINGS)[0][2]["advantage"], abs=1e-9)


def test_the_gradient_shown_is_that_of_the_loss(opened):
    """By differences of the loss of one token; of clipped and of unclipped ones."""
    raw = toy_tensors()
    rolled, n_tokens, step = recomputed(raw, SETTINGS), int(raw["mask"].sum()), 1e-6
    for t in range(len(WORDS[0])):
        choose(opened, 0, t, 2)
        losses = []
        for sign in (1, -1):
            moved = {**raw, "new_logprobs": raw["new_logprobs"] + sign * step}
            losses.append(recomputed_epoch(moved, rolled, SETTINGS, 2)["policy_loss"][0, t].item())
        gradient = (losses[0] - losses[1]) / (2 * step) / n_tokens
        assert is_shown(steps(opened)["minibatch_loss-14"][2][-1], gradient), t


def test_each_equation_has_its_line_of_code_and_its_paper(opened, trace):
    for equation in trace["equations"]:
        found = opened.run(
            "[...document.querySelectorAll('.step .code')].map((code) => code.innerText)"
            f".filter((text) => text.split('\\n')[0].endsWith(' · {equation['name']}'))"
        )
        assert found, equation["name"]
        for code in found:
            assert equation["name"] in code and f"{equation['file']}:" in code
            line = int(code.split(":")[1].split()[0])
            written = (Path(__file__).parents[1] / equation["file"]).read_text(encoding="utf-8").splitlines()
            shown_lines = [text.strip() for text in code.split("\n")[1:] if text.strip()]
            assert written[line - 1].strip() == shown_lines[0]
    marked = opened.run("[...document.querySelectorAll('mark')].map((line) => line.textContent.trim())")
    assert [line.split(" =")[0] for line in marked] == ["return d", "delta", "advantage"]


def test_the_bonus_of_entropy_is_in_the_loss(tab, tmp_path):
    trace = toy_trace(entropy_coef=0.2)
    write_page(trace, tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri())
    for t in range(len(WORDS[0])):
        choose(tab, 0, t, 2)
        now = trace["rows"][0]["epochs"][2]["tokens"][t]
        total = (now["policy_loss"] + 0.5 * now["value_loss"] - 0.2 * now["entropy"]) / sum(map(len, WORDS))
        assert is_shown(steps(tab)["minibatch_loss-14"][1][-1], total), t
    assert complaints(tab) == []


def test_what_became_of_the_score_is_worked_out(tab, tmp_path):
    """A text that was cut, whose score is normalised, then clipped."""
    trace = toy_trace()
    kept = toy_tensors()["scores"].tolist()
    moments = {"over": "run", "mean": 0.2, "variance": 0.25, "n_scores": 40}
    normal = (kept[1] - 0.2) / math.sqrt(0.25 + 1e-8)
    trace["scores"] = {"penalised": kept, "scale": moments, "clip": 1.5}
    trace["rows"][1]["score"] = max(normal, -1.5)
    write_page(trace, tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri())
    choose(tab, 1, 0, 0)
    found = steps(tab)
    assert [shown(x) for x in found["penalise_missing_eos-4"][0]] == [kept[1] + 0.5, 0.5, kept[1]]
    lines = found["shape_scores-5"]
    assert [is_shown(line[-1], x) for line, x in zip(lines, (normal, -1.5), strict=True)] == [True] * 2
    said = tab.run("document.querySelector('[data-step=shape_scores-5]').innerText")
    assert "of all scores of the run so far, 40 in number, then held to ±1.5" in said


def test_a_number_reads_from_left_to_right_whatever_its_token_does(tab, tmp_path):
    trace = toy_trace()
    trace["rows"][0]["tokens"][0]["text"] = " שלום"
    write_page(trace, tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri())
    directions = "['.text', '.number'].map((c) => getComputedStyle(document.querySelector('#token-0 ' + c)).direction)"
    assert tab.run(directions) == ["rtl", "ltr"]


def test_the_row_is_named_as_the_command_line_names_it(tab, tmp_path):
    trace = toy_trace()
    for row, number in zip(trace["rows"], (3, 5, 0), strict=True):
        row["row"] = number
    write_page(trace, tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri() + "#row=5")
    assert tab.run("state.row") == 1
    assert tab.run("byId('response-label').textContent") == "Response, row 5 of the batch, score −0.750"
    assert tab.run("[...document.querySelectorAll('#rows label')].map((l) => l.innerText)") == [
        "row 3",
        "row 5",
        "row 0",
    ]


def test_marks_of_a_chart_do_not_lie_on_one_another(opened):
    """Ratios of 40 beside a band of 0.8 to 1.2, on which its marks would be one smear."""
    opened.run("for (const epoch of TRACE.rows[0].epochs) epoch.tokens[0].ratio = 40; choose({ row: 0, epoch: 0 })")
    places = opened.run(
        "[...document.querySelectorAll('#charts svg:last-of-type text[text-anchor=end]')]"
        ".filter((t) => !t.hasAttribute('transform')).map((t) => [t.textContent, Number(t.getAttribute('y'))])"
    )
    ratio = places[-2:]
    assert {text for text, _ in ratio} == {"1.00", "40.00"}
    assert abs(ratio[0][1] - ratio[1][1]) > 11


# ----------------------------------------------------------------------------------------------------------------
# What if?
# ----------------------------------------------------------------------------------------------------------------

OTHER = [
    {"kl_coef": 0.4},
    {"gamma": 0.8, "lam": 0.5},
    {"lam": 0.0},
    {"clip_range": 0.05, "clip_range_value": 0.1},
    {"kl_estimator": "k2"},
    {"kl_estimator": "k3", "kl_coef": 0.9},
    {"kl_estimator": "abs"},
    {"whiten_advantages": False},
]


def test_at_the_runs_own_settings_the_page_computes_what_the_run_had(opened, trace):
    found = opened.run("recompute(TRACE, TRACE.settings, ownScores())")
    assert found["whitening"] == pytest.approx(trace["whitening"], abs=1e-9)
    for row, right in zip(found["rows"], trace["rows"], strict=True):
        assert row["tokens"] == [pytest.approx(token, abs=1e-9) for token in right["tokens"]]
        for epoch, right_epoch in zip(row["epochs"], right["epochs"], strict=True):
            assert epoch["tokens"] == [pytest.approx(token, abs=1e-9) for token in right_epoch["tokens"]]


def test_of_a_real_update_the_page_computes_what_was_trained_on(tab, tmp_path):
    """By the explain task's own trace, which is of float32: as it was, and at another price of KL and another λ."""
    trace, course = traced("gpt2")
    write_page(trace, tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri())
    found = tab.run("recompute(TRACE, TRACE.settings, ownScores())")
    for row, right in zip(found["rows"], trace["rows"], strict=True):
        assert row["tokens"] == [pytest.approx(token, abs=1e-5) for token in right["tokens"]]
        for epoch, right_epoch in zip(row["epochs"], right["epochs"], strict=True):
            assert epoch["tokens"] == [pytest.approx(token, abs=1e-5) for token in right_epoch["tokens"]]
    put(tab, "kl_coef", 0.9)
    put(tab, "lam", 0.5)
    past = course.rollout
    rewards = ppo.shape_rewards(scores=past.scores, kl=past.kl, mask=past.mask, kl_coef=0.9)
    advantages = ppo.estimate_advantages(
        rewards=rewards, values=past.values, mask=past.mask, gamma=trace["settings"]["gamma"], lam=0.5
    )
    whitened = ppo.masked_whiten(advantages, past.mask)
    for row in range(len(past.mask)):
        choose(tab, row, 0, 1)
        for t, token in enumerate(table(tab)):
            assert token["advantage"] == pytest.approx(advantages[row, t].item(), abs=1e-5)
            assert token["whitened"] == pytest.approx(whitened[row, t].item(), abs=1e-5)
    assert complaints(tab) == []


def assert_table(tab: Browser, raw: dict, settings: dict) -> None:
    """The table of each shown response, after the last epoch, is what ppo.py makes of the whole batch."""
    rolled = recomputed(raw, settings)
    now = recomputed_epoch(raw, rolled, settings, N_EPOCHS)
    for row in range(N_SHOWN):
        choose(tab, row, 0, N_EPOCHS)
        for t, token in enumerate(table(tab)):
            right = {name: x[row, t].item() for name, x in rolled.items()}
            right |= {f"now_{name}": x[row, t].item() for name, x in now.items()}
            for name, x in token.items():
                assert name == "now_branch" or x == pytest.approx(right[name], abs=1e-6), (row, t, name)


@pytest.mark.parametrize("settings", OTHER, ids=str)
def test_at_other_settings_the_page_computes_what_ppo_does(opened, settings):
    """Whitening is over the whole batch, the responses that are not shown included."""
    for name, value in settings.items():
        put(opened, name, str(value).lower() if isinstance(value, bool) else value)
    assert opened.run("byId('changed').hidden") is False
    assert_table(opened, toy_tensors(), SETTINGS | settings)
    opened.run("document.querySelector('.reset').click()")
    assert opened.run("byId('changed').hidden") is True
    assert_table(opened, toy_tensors(), SETTINGS)


def test_another_score_of_one_response_moves_all_advantages(opened):
    choose(opened, 1, 0, 0)
    put(opened, "score-set", 2.0)
    raw = toy_tensors()
    raw["scores"][1] = 2.0
    assert_table(opened, raw, SETTINGS)


def test_with_another_score_the_runs_own_is_told_and_what_stands_in_its_place(opened):
    choose(opened, 1, 0, 0)
    put(opened, "score-set", 2.0)
    said = opened.run("['4', '5'].map((n) => byId('step-' + n).nextElementSibling.textContent)")
    assert said[0].startswith("The reward gave the text −0.2500") and "cut before its end, which costs 0.5" in said[0]
    assert said[1].endswith("Under What if? +2.0000 stands in its place.")


def test_of_a_part_of_the_batch_the_page_keeps_the_runs_moments_and_says_so(tab, trace, tmp_path):
    part = {**trace, "batch": {"n_tokens": trace["batch"]["n_tokens"]}}
    write_page(part, tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri())
    assert tab.run("byId('held').hidden") is False
    put(tab, "kl_coef", 0.4)
    advantages = by_hand(trace["batch"]["raw"], SETTINGS | {"kl_coef": 0.4})[0]
    mean, variance = trace["whitening"]["mean"], trace["whitening"]["variance"]
    for token, right in zip(table(tab), advantages, strict=True):
        assert token["whitened"] == pytest.approx((right["advantage"] - mean) / math.sqrt(variance + 1e-8), abs=1e-9)


@pytest.mark.parametrize("settings", [{"whiten_advantages": False}, {"kl_estimator": "k3"}, {"ppo_epochs": 3}], ids=str)
def test_other_runs_load_too(tab, tmp_path, settings):
    """Not whitened, by another estimator, of one response alone, without the numbers of the whole batch."""
    trace = toy_trace(**settings)
    trace["rows"] = trace["rows"][1:2]
    trace["equations"] = []
    del trace["batch"]
    write_page(trace, tmp_path / "page.html")
    tab.open((tmp_path / "page.html").as_uri())
    assert complaints(tab) == []
    for epoch in range(N_EPOCHS + 1):
        choose(tab, 0, 3, epoch)
        assert "no number" not in tab.run("byId('step-list').innerText")
        assert "undefined" not in tab.run("document.body.innerText")


# ----------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
def test_it_loads_without_errors_and_without_the_network(tab, url, dark):
    tab.open(url, dark=dark)
    choose(tab, 1, 2, 1)
    requests = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert [request for request in requests if not request.startswith("data:")] == [url]
    assert complaints(tab) == []
    assert tab.run("document.title").startswith("an update on the policy")
    assert tab.run("DRAWS_MATHML") and tab.run("document.querySelectorAll('math').length") > 20


def test_texts_of_a_run_are_shown_as_texts(opened):
    assert opened.run("byId('prompt').textContent") == HOSTILE
    assert opened.run("document.querySelectorAll('img, main script').length") == 0
    words = opened.run("[...document.querySelectorAll('.token .text')].map((node) => node.textContent)")
    assert words == [
        word.replace("\n", "↵").replace(" ", "␣") if not word.strip(" ") else word.replace("\n", "↵")
        for word in WORDS[0]
    ]


def test_a_link_opens_at_a_token(tab, url):
    tab.open(url + "#row=1&token=2&epoch=1")
    assert tab.run("[state.row, state.token, state.epoch]") == [1, 2, 1]
    assert tab.run("document.querySelector('input[name=row]:checked').value") == "1"
    tab.open(url + "#row=99&token=-4&epoch=x")
    assert tab.run("[state.row, state.token, state.epoch]") == [0, 0, 0]


def test_the_mouse_chooses_tokens_responses_colours_and_the_theme(opened):
    opened.click("#token-4")
    assert opened.run("[state.token, document.activeElement.id]") == [4, "token-4"]
    opened.click("#charts .hit:nth-of-type(7)")
    assert opened.run("state.token") != 4
    opened.click("#rows label:nth-of-type(2) input")
    assert opened.run("[state.row, state.token]") == [1, 0]
    opened.click("#colours label:nth-of-type(3) input")
    assert opened.run("state.colour") == "kl"
    assert opened.run("Number(byId('token-0').dataset.value) === currentToken().kl")
    opened.click("#theme")
    assert opened.run("getComputedStyle(document.documentElement).colorScheme") == "dark"
    opened.click("#theme")
    assert opened.run("getComputedStyle(document.documentElement).colorScheme") == "light"


def tab_stops(tab: Browser) -> list[str]:
    """What the Tab key reaches, in order, by id or what else tells it."""
    tab.run("document.activeElement.blur(); scrollTo(0, 0)")
    found = []
    for _ in range(150):
        tab.press("Tab")
        stop = tab.run(
            "(() => { const e = document.activeElement; return e === document.body ? null : e.id || e.name ||"
            " e.getAttribute('aria-label') || e.className || e.textContent.slice(0, 30); })()"
        )
        if stop is None or (len(found) > 5 and stop == found[0]):
            return found
        found.append(stop)
    raise AssertionError(found)


def test_the_keyboard_reaches_everything(opened):
    opened.run("byId('what-if').open = true")
    found = tab_stops(opened)
    wanted = ["skip", "theme", "Never seen PPO? Begin here", "next", "epoch", "row", "token-0", "colour"]
    wanted += ["What if? Other settings, the s", "kl_coef", "gamma", "lam", "clip_range", "clip_range_value"]
    wanted += ["score-set", "kl_estimator", "whiten_advantages", "reset", "Table of all numbers", "Symbols"]
    assert [stop for stop in wanted if stop not in found] == []
    assert [found.index(stop) for stop in wanted[:7]] == sorted(found.index(stop) for stop in wanted[:7])
    assert len([stop for stop in found if stop.startswith("token-")]) == 1  # one stop; arrows go on from there


def test_the_keys_do_what_the_mouse_does(opened):
    opened.run("byId('token-0').focus()")
    for key, at in [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 11),
        ("ArrowDown", 11),
        ("Home", 0),
    ]:
        opened.press(key)
        assert opened.run("[state.token, document.activeElement.id]") == [at, f"token-{at}"]
        assert opened.run("document.querySelectorAll('[aria-selected=true]').length") == 1
    opened.run("byId('epoch').focus()")
    opened.press("ArrowRight")
    opened.press("ArrowRight")
    assert opened.run("[state.epoch, byId('epoch-text').textContent]") == [2, "After epoch 2 of 3"]
    opened.run("byId('next').focus()")
    opened.press("Enter")
    assert opened.run("[state.token, document.activeElement.id]") == [1, "next"]
    opened.run("byId('what-if').open = true; byId('lam').focus()")
    opened.press("ArrowLeft")
    assert opened.run("state.settings.lam") == pytest.approx(SETTINGS["lam"] - 0.01)
    assert opened.run("document.activeElement.id") == "lam"


def test_what_has_the_focus_is_seen(opened):
    opened.run("document.activeElement.blur()")
    for _ in range(12):
        opened.press("Tab")
        style = opened.run(
            "[document.activeElement, document.activeElement.nextElementSibling].filter(Boolean).map((e) =>"
            " getComputedStyle(e).outlineStyle + parseFloat(getComputedStyle(e).outlineWidth))"
        )
        assert any(each.startswith("solid") and float(each[5:]) >= 2 for each in style), style


@pytest.mark.parametrize("size", ["phone", "smallest"])
def test_a_phone_never_scrolls_sideways(tab, url, size):
    tab.open(url, *SIZES[size])
    tab.run("byId('what-if').open = true")
    for row, token, epoch in [(0, 0, 0), (0, 6, 3), (1, 5, 2), (2, 0, 3)]:
        choose(tab, row, token, epoch)
        put(tab, "kl_estimator", "k3")
        width = tab.run("[document.documentElement.scrollWidth, innerWidth]")
        assert width == [SIZES[size][0]] * 2
    small = (
        "[...document.querySelectorAll('button, .token, .choice, input[type=range], summary')].map((e) =>"
        " [e.id || e.className || e.textContent, e.getBoundingClientRect()]).filter(([, r]) => r.width &&"
        " (r.width < 24 || r.height < 24)).map(([name, r]) => [name, r.width, r.height])"
    )
    assert tab.run(small) == []  # what a finger can hit: WCAG 2.2, 2.5.8


CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour, over) => {
    canvas.fillStyle = over; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(" ")})`;
  };
  const light = (colour) => {
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/\\d+/g).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const own = (node) => getComputedStyle(node).backgroundColor;
  const behind = (node) => (node ? rgb(own(node), behind(node.parentElement)) : "rgb(255 255 255)");
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement, box = e.getBoundingClientRect();
    if (!node.data.trim() || !box.width || e.closest("script, style, .out-of-sight, :disabled, noscript")) continue;
    const style = getComputedStyle(e), ground = behind(e);
    const a = light(rgb(e.closest("svg") ? style.fill : style.color, ground)), b = light(ground);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([contrast, node.data.trim().slice(0, 30), e.className.baseVal ?? e.className]);
  }
  return found;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_told_from_what_is_behind_it(tab, url, dark):
    """WCAG 2.2, 1.4.3: 4.5 to 1, for every text on the page, also on the strongest colours."""
    tab.open(url, dark=dark)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for row, colour in enumerate(("advantage", "advantage", "kl", "ratio")):
        tab.run(f"choose({{ row: {row % N_SHOWN}, colour: '{colour}', epoch: 3 }}); {SETTLED}")
        found = tab.run(CONTRAST)
        assert len(found) > 200
        assert [each for each in found if each[0] < 4.5] == []
    put(tab, "lam", 0.5)
    assert [each for each in tab.run(CONTRAST) if each[0] < 4.5] == []


def test_both_themes_follow_the_system_until_told_otherwise(tab, url):
    ground = "getComputedStyle(document.body).backgroundColor"
    tab.open(url)
    light = tab.run(ground)
    tab.open(url, dark=True)
    dark = tab.run(ground)
    assert light != dark and tab.run("byId('theme').getAttribute('aria-pressed')") == "true"
    tab.run("byId('theme').click()")
    assert tab.run(ground) == light and tab.run("byId('theme').getAttribute('aria-pressed')") == "false"


def test_the_two_signs_differ_by_hue_that_every_eye_tells_apart(opened):
    """Blue against orange: the difference of blue and red has the signs' order, whatever red and green look like."""
    colour = "getComputedStyle(document.querySelector('.token.%s')).backgroundColor"
    to_rgb = (
        "((c) => { const x = document.createElement('canvas').getContext('2d'); x.fillStyle = c;"
        " x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data]; })(%s)"
    )
    opened.run(SETTLED)
    red, _, blue, _ = opened.run(to_rgb % (colour % "up"))
    assert blue > red
    opened.run(f"choose({{ row: 1 }}); {SETTLED}")
    red, _, blue, _ = opened.run(to_rgb % (colour % "down"))
    assert red > blue
    labels = opened.run(
        "[...document.querySelectorAll('.token')].map((e) => [e.className, e.querySelector('.number').textContent])"
    )
    assert all(text[0] == {"up": "+", "down": "−"}[name.split()[1]] for name, text in labels)


# ----------------------------------------------------------------------------------------------------------------
# What a screen reader is told
# ----------------------------------------------------------------------------------------------------------------


def named(nodes: list[dict], role: str) -> list[str]:
    return [node["name"] for node in nodes if node["role"] == role]


def test_roles_and_names(opened, trace):
    choose(opened, 0, 1, 2)
    nodes = opened.accessible()
    assert opened.run("document.documentElement.lang") == "en"
    assert len(named(nodes, "main")) == 1 and len(named(nodes, "banner")) == 1
    assert named(nodes, "listbox") == ["Tokens of the response"]
    options = [
        node
        for node in nodes
        if node["role"] == "option" and node["name"] not in ("k1", "k2", "k3", "abs", "yes", "no")
    ]
    whitened = trace["rows"][0]["tokens"][1]["whitened"]
    assert options[1]["name"] == f"loved, advantage {'+' if whitened > 0 else '−'}{abs(whitened):.4f}, token 1 of 0–11"
    assert [node.get("selected", False) for node in options] == [t == 1 for t in range(12)]
    for role in (
        "button",
        "slider",
        "radio",
        "link",
        "image",
        "table",
        "region",
        "option",
        "combobox",
        "DisclosureTriangle",
    ):
        assert all(name.strip() for name in named(nodes, role)), role
    charts = named(nodes, "image")
    assert len(charts) == 5  # four along the response, and the loss against the ratio
    assert all(
        any(chart.startswith(name) for chart in charts)
        for name in ("Reward r.", "Value V and", "Advantage Â", "Ratio q")
    )
    assert all(word in charts[2] for word in ("Highest", "lowest", "chosen token"))
    headings = [node["level"] for node in nodes if node["role"] == "heading"]
    assert headings[0] == 1 and all(b - a <= 1 for a, b in pairwise(headings))
    assert len(named(nodes, "columnheader")) > 20 and len(named(nodes, "rowheader")) >= 12
    assert opened.run("byId('epoch').getAttribute('aria-valuetext')") == "After epoch 2 of 3"


def test_formulas_are_told_as_mathematics(opened):
    nodes = opened.accessible()
    assert len([node for node in nodes if node["role"] == "MathMLMath"]) > 20
    assert {"MathMLFraction", "MathMLSub", "MathMLSquareRoot"} <= {node["role"] for node in nodes}
    texts = opened.run("[...document.querySelectorAll('math')].map((node) => node.getAttribute('alttext'))")
    assert "R_t" in texts and all(texts)


def test_without_mathml_formulas_are_lines_of_text(tab, url, trace, tmp_path):
    path = tmp_path / "page.html"
    write_page(trace, path)
    path.write_text(path.read_text("utf-8").replace("return Math.abs(width - 20) < 2;", "return false;"), "utf-8")
    tab.open(path.as_uri())
    choose(tab, 0, 3, 0)
    assert complaints(tab) == [] and tab.run("document.querySelectorAll('math').length") == 0
    line = tab.run("document.querySelector('[data-step=estimate_returns-9] .filled').innerText").replace("\n", " ")
    token = trace["rows"][0]["tokens"][3]
    numbers = [f"{token[name]:.4f}".replace("-", "−") for name in ("advantage", "value", "return")]
    assert all(number in line for number in numbers) and line.startswith("R_t")
    width = tab.run("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] == width[1]


def test_what_is_chosen_is_said(opened):
    assert opened.run("byId('said').getAttribute('aria-live')") == "polite"
    opened.click("#token-2")
    said = opened.run("byId('said').textContent")
    assert said.startswith("Token 2 of 0–11, “every”: reward") and "Before the update: ratio 1.0000, unclipped" in said
    put(opened, "epoch", 3)
    assert "After epoch 3: ratio" in opened.run("byId('said').textContent")


def test_nothing_moves_for_those_who_ask_for_that(tab, url):
    moving = (
        "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration.split(', ')"
        ".some((t) => parseFloat(t) > 0)).length"
    )
    tab.open(url, prefers_reduced_motion="reduce")
    assert tab.run(moving) == 0
    tab.open(url, prefers_reduced_motion="no-preference")
    assert tab.run(moving) > 0


def test_print_has_text_charts_and_equations_and_no_controls(tab, url):
    tab.open(url)
    tab.send("Emulation.setEmulatedMedia", media="print")
    height = "document.querySelector('%s').getBoundingClientRect().height"
    assert all(tab.run(height % part) > 20 for part in ("#tokens", "#charts", "#step-list", "#table"))
    assert all(tab.run(height % part) == 0 for part in ("#what-if", "#theme", "#next", ".skip"))
    assert tab.run("getComputedStyle(document.querySelector('.bar')).position") == "static"
    tab.send("Emulation.setEmulatedMedia", media="")


@pytest.mark.skipif(
    importlib.util.find_spec("axe_core_python") is None, reason="axe is not here: pip install axe-core-python"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_axe_finds_nothing(tab, url, dark, size):
    rules = Path(importlib.util.find_spec("axe_core_python").origin).with_name("axe.min.js").read_text(encoding="utf-8")
    tab.open(url, *SIZES[size], dark=dark)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    choose(tab, 0, 3, 2)
    tab.run(rules + "; 0")
    found = tab.run("axe.run().then(({ violations }) => violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))")
    assert found == []
