"""What the SDKs are asked for: the same tool, the same shape of answer, the same prompts.

The demo models are too small to choose well, so tools are required and answers have shapes in which any
path is short.
"""

from typing import Literal

from pydantic import BaseModel, Field

STORY = "Write a story about a cat."
HELLO = "Say hello."
WEATHER = "What is the weather in Paris?"
TOO_LONG = "hello " * 600
"""More than the context of the server with keys, less than that of the other."""


class Review(BaseModel):
    """A short review of a film."""

    verdict: Literal["good", "bad"]
    stars: int = Field(ge=1, le=5)


WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of the next days.", "parameters": WEATHER_SCHEMA},
}


ONE_CALL = {"parallel_tool_calls": False}
"""With a required tool; the smallest of models would call it for ever."""


def check_weather(arguments: dict) -> None:
    """Arguments as `WEATHER_SCHEMA` has them."""
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Paris", "Rome")
    assert isinstance(arguments["days"], int) and 1 <= arguments["days"] <= 9
