"""JSON texts that end in their midst: what they say so far, and whether a schema's document may begin so."""

import json
import re

import jsonschema

STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
ESCAPE = re.compile(r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?")
SCALAR = re.compile(r"[-+.\w]*")
SPACE = re.compile(r"[ \t\r\n]*")
NOTHING = object()

# What may be wrong with a value that is not finished, and come right with what is to follow.
UNFINISHED = {
    *("required", "minProperties", "minItems", "minLength", "pattern", "format", "enum", "const"),
    *("anyOf", "oneOf", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


class Beginning:
    """Reads a text. Every method gives a value, or `NOTHING`, and the path to what is open in it; `None`: it is whole."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def document(self):
        value, opened = self.value()
        if opened is None and self.next():
            raise ValueError(f"{self.text[self.at:]!r} after the end")
        return value, opened

    def next(self) -> str:
        """The next character that is no space; nothing at the end."""
        self.at = SPACE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def expect(self, wanted: str) -> bool:
        """Goes past a character; false at the end."""
        found = self.next()
        if found and found not in wanted:
            raise ValueError(f"{found!r} at {self.at}, not {wanted!r}")
        self.at += len(found)
        return bool(found)

    def value(self):
        match self.next():
            case '"':
                return self.string()
            case "[":
                return self.container([], "]")
            case "{":
                return self.container({}, "}")
            case _:
                return self.scalar()

    def string(self):
        begin, end = self.at, STRING.match(self.text, self.at).end()
        if self.text[end : end + 1] == '"':
            self.at = end + 1
            return json.loads(self.text[begin : self.at]), None
        if not ESCAPE.fullmatch(self.text, end):
            raise ValueError(f"no string at {begin}")
        self.at = len(self.text)
        return json.loads(self.text[begin:end] + '"'), []

    def scalar(self):
        word = SCALAR.match(self.text, self.at)[0]
        self.at += len(word)
        if self.at < len(self.text):
            return json.loads(word), None
        # A number may go on; a word or an exponent that has only begun is nothing yet.
        try:
            return json.loads(word), []
        except ValueError:
            if not any(whole.startswith(word) for whole in ["true", "false", "null"]):
                json.loads(word + "0")
            return NOTHING, []

    def container(self, value, closer: str):
        self.at += 1
        while self.next() != closer:
            if value and not self.expect(","):
                return value, []
            key = len(value)
            if closer == "}":
                if not self.next():
                    return value, []
                if self.next() != '"':
                    raise ValueError(f"no key at {self.at}")
                key, opened = self.string()
                if opened is not None or not self.expect(":"):
                    return value, []
            item, opened = self.value()
            if item is NOTHING:
                return value, []
            if closer == "}":
                value[key] = item
            else:
                value.append(item)
            if opened is not None:
                return value, [key, *opened]
        self.at += 1
        return value, None


def faults_of_a_beginning(schema: dict, text: str) -> list[str]:
    """Why no document that `schema` allows begins with `text`: where it is no JSON, or a part that is whole is wrong.

    Less than all there is to say: what is open may be past saving, and alternatives that are open are not looked into.
    """
    try:
        value, opened = Beginning(text).document()
    except ValueError as error:
        return [str(error)]
    if value is NOTHING:
        return []

    def may_come_right(error: jsonschema.ValidationError) -> bool:
        at = list(error.absolute_path)
        return opened is not None and at == opened[: len(at)] and error.validator in UNFINISHED

    return [error.message for error in validator(schema).iter_errors(value) if not may_come_right(error)]


def validator(schema: dict) -> jsonschema.Draft202012Validator:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(schema, format_checker=checker)
