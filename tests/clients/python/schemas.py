"""Random JSON schemas, of what the server enforces."""

import random

WORDS = ["name", "age", "colour", "Größe", "tags", "a b", 'quo"te', "path/x", "id", "kind", "値"]
PATTERNS = ["^[a-z]{2,6}$", r"^\d{3}-\d{4}$", "^(red|green|blue)$", "^A", "[0-9]$", r"^[A-Z][a-z]+( [A-Z][a-z]+)?$", "x+y"]


class Schemas:
    """Draws schemas; the same seed draws the same ones."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.defs: dict[str, dict] = {}

    def document(self) -> dict:
        """A whole schema: mostly an object, with definitions that it refers to."""
        self.defs = {}
        for name in self.random.sample(["node", "a/b", "thing one"], self.random.randint(0, 2)):
            self.defs[name] = self.value(1)
        if self.random.random() < 0.3:
            # One that holds itself.
            inner = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
            self.defs["tree"] = self.object({"leaf": self.value(2), "more": inner}, required=["leaf"])
        schema = self.object_of(0) if self.random.random() < 0.8 else self.value(0)
        return {**schema, "$defs": self.defs} if self.defs else schema

    def value(self, depth: int) -> dict:
        leaves = [self.string, self.integer, self.number, self.boolean, self.enum, self.const, self.several]
        if self.defs:
            leaves.append(self.reference)
        inner = [self.array, self.object_of, self.alternatives, self.both]
        kinds = leaves if depth >= 3 else leaves + inner
        make = self.random.choice(kinds)
        return make(depth)

    def string(self, _depth: int) -> dict:
        r = self.random
        kind = r.random()
        if kind < 0.35:
            return {"type": "string", "pattern": r.choice(PATTERNS), "maxLength": 20}
        if kind < 0.5:
            return {"type": "string", "format": r.choice(["ipv4", "uuid", "email"]), "maxLength": 40}
        low = r.randint(0, 5)
        return {"type": "string", "minLength": low, "maxLength": low + r.randint(0, 12)}

    def integer(self, _depth: int) -> dict:
        r = self.random
        schema: dict = {"type": "integer"}
        low = r.randint(-1000, 1000)
        if r.random() < 0.8:
            schema[r.choice(["minimum", "exclusiveMinimum"])] = low
        if r.random() < 0.8:
            schema[r.choice(["maximum", "exclusiveMaximum"])] = low + r.randint(2, 500)
        if r.random() < 0.2:
            return {"type": "integer", "multipleOf": r.randint(2, 12), "minimum": 0, "maximum": 999}
        return schema

    def number(self, _depth: int) -> dict:
        low = self.random.randint(-40, 40) / 4
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + self.random.randint(1, 40) / 4}

    def boolean(self, _depth: int) -> dict:
        return {"type": self.random.choice(["boolean", "null"])}

    def several(self, _depth: int) -> dict:
        return {"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 9}

    def enum(self, _depth: int) -> dict:
        values = ["red", "", 'a "b"\n', 7, -2.5, None, True, ["x", 1], {"k": "ü"}]
        return {"enum": self.random.sample(values, self.random.randint(1, 5))}

    def const(self, _depth: int) -> dict:
        return {"const": self.random.choice(["fixed", 42, None, False, [1, 2], {"a": {"b": "c"}}])}

    def reference(self, _depth: int) -> dict:
        name = self.random.choice(list(self.defs))
        return {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1").replace(" ", "%20")}

    def array(self, depth: int) -> dict:
        r = self.random
        low = r.randint(0, 2)
        schema = {"type": "array", "items": self.value(depth + 1), "minItems": low, "maxItems": low + r.randint(0, 2)}
        if r.random() < 0.25:
            first = [self.value(depth + 1) for _ in range(r.randint(1, 2))]
            schema = {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}
        return schema

    def object_of(self, depth: int) -> dict:
        names = self.random.sample(WORDS, self.random.randint(1, 4))
        return self.object({name: self.value(depth + 1) for name in names})

    def object(self, properties: dict, required: list | None = None) -> dict:
        r = self.random
        if required is None:
            required = [name for name in properties if r.random() < 0.7]
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        kind = r.random()
        if kind < 0.15:
            schema["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 99}
            schema["required"] = list(properties)
            schema["maxProperties"] = len(properties) + 2
        elif kind < 0.25:
            schema["patternProperties"] = {"^x-[a-z]{1,5}$": {"type": "boolean"}}
        elif kind < 0.3:
            del schema["additionalProperties"]
        return schema

    def alternatives(self, depth: int) -> dict:
        if self.random.random() < 0.4:
            cases = [
                self.object({"kind": {"const": kind}, "value": self.value(depth + 1)}, ["kind", "value"])
                for kind in ["one", "two"]
            ]
            return {"oneOf": cases}
        return {"anyOf": [self.value(depth + 1), self.value(depth + 1)]}

    def both(self, depth: int) -> dict:
        names = self.random.sample(WORDS, 3)
        parts = [{"type": "object", "properties": {name: self.value(depth + 1)}, "required": [name]} for name in names[:2]]
        return {"properties": {names[2]: {"type": "integer", "maximum": 50}}, "allOf": parts}
