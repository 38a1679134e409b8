"""Rewards and judges that nobody here trained, for `--reward_fn benchmarks/judges.py:NAME` (docs/results.md).

pip install vaderSentiment alt-profanity-check
"""


def happy(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """VADER's sentiment, -1 to 1: of a list of words with weights, and some rules."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


def sad(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    return [-score for score in happy(prompts, responses, rows)]


def clean(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """The probability that a response is not offensive, by a linear classifier of words."""
    from profanity_check import predict_prob

    return [1 - float(probability) for probability in predict_prob(responses)]
