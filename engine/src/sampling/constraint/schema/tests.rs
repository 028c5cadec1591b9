use super::*;

fn refusal(schema: &Value) -> String {
    enforced(schema).map(|v| v.to_string()).unwrap_err().to_string()
}

#[test]
fn what_is_not_enforced_is_refused_by_name_and_place() {
    let unknown = [
        ("not", json!({})),
        ("if", json!({})),
        ("then", json!({})),
        ("else", json!({})),
        ("uniqueItems", json!(true)),
        ("contains", json!({})),
        ("minContains", json!(1)),
        ("maxContains", json!(1)),
        ("propertyNames", json!({"pattern": "^a"})),
        ("dependencies", json!({})),
        ("dependentRequired", json!({})),
        ("dependentSchemas", json!({})),
        ("unevaluatedItems", json!(false)),
        ("unevaluatedProperties", json!(false)),
        ("$dynamicRef", json!("#a")),
        ("$recursiveRef", json!("#")),
        ("$anchor", json!("a")),
        ("format", json!("postcode")),
        ("nullable", json!(true)),
        ("maximun", json!(3)),
        ("minProperties", json!(2)),
        ("additionalItems", json!(false)),
    ];
    for (keyword, value) in unknown {
        let inner = json!({keyword: value});
        for (around, at) in [
            (inner.clone(), "#"),
            (json!({"allOf": [{"type": "object"}, inner]}), "#/allOf/1"),
            (json!({"anyOf": [inner]}), "#/anyOf/0"),
            (json!({"oneOf": [inner]}), "#/oneOf/0"),
            (json!({"$defs": {"a/b": inner}}), "#/$defs/a~1b"),
            (json!({"definitions": {"a": inner}}), "#/definitions/a"),
            (json!({"properties": {"p": {"items": inner}}}), "#/properties/p/items"),
            (json!({"prefixItems": [inner]}), "#/prefixItems/0"),
            (json!({"items": [inner], "additionalItems": true}), "#/items/0"),
            (json!({"items": [true], "additionalItems": inner}), "#/additionalItems"),
            (json!({"patternProperties": {"^p": inner}}), "#/patternProperties/^p"),
            (json!({"additionalProperties": inner}), "#/additionalProperties"),
        ] {
            let words = refusal(&around);
            assert!(words.starts_with(&format!("at {at}/{keyword}: ")), "{around}: {words}");
            assert!(words.split(": ").nth(1).is_some_and(|w| w.contains(keyword)), "{around}: {words}");
        }
    }
    for (schema, at) in [
        (json!(3), "#"),
        (json!(false), "#"),
        (json!({"type": "text"}), "#/type"),
        (json!({"type": []}), "#/type"),
        (json!({"required": "a"}), "#/required"),
        (json!({"properties": []}), "#/properties"),
        (json!({"enum": []}), "#/enum"),
        (json!({"anyOf": {}}), "#/anyOf"),
        (json!({"maxLength": -1}), "#/maxLength"),
        (json!({"maxLength": 1.5}), "#/maxLength"),
        (json!({"exclusiveMinimum": true}), "#/exclusiveMinimum"),
        (json!({"multipleOf": 0}), "#/multipleOf"),
        (json!({"pattern": 1}), "#/pattern"),
        (json!({"const": [9_007_199_254_740_993_u64]}), "#/const"),
        (json!({"$ref": "https://example.com/a"}), "#/$ref"),
        (json!({"$ref": "#a"}), "#/$ref"),
        (json!({"$ref": "#/$defs/a"}), "#/$ref"),
        (json!({"$ref": "#/default", "default": {"not": {}}}), "#/$ref"),
        (json!({"items": {"$schema": "http://json-schema.org/draft-04/schema#"}}), "#/items/$schema"),
    ] {
        let words = refusal(&schema);
        assert!(words.starts_with(&format!("at {at}: ")), "{schema}: {words}");
    }
}

#[test]
fn what_is_enforced_goes_on_and_notes_do_not() {
    let schema = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "T",
        "x-guidance": {"lenient": true},
        "type": "object",
        "$ref": "#/definitions/a%20b",
        "properties": {"title": {"type": "string", "maxLength": 3.0, "uniqueItems": false}},
        "definitions": {"a b": {"required": ["title"], "propertyNames": {"type": "string"}}},
        "additionalProperties": false
    });
    let options = json!({"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES});
    let expected = json!({
        "type": "object",
        "properties": {"title": {"type": "string", "maxLength": 3}},
        "definitions": {"a b": {"required": ["title"]}},
        "additionalProperties": false,
        "$ref": "#/definitions/a%20b",
        "x-guidance": options
    });
    assert_eq!(enforced(&schema).unwrap().to_string(), expected.to_string(), "in this order");
    assert_eq!(enforced(&json!(true)).unwrap(), json!({"x-guidance": options}));
}

/// Where the bound itself must not be written; of integers it is right as it is.
#[test]
fn an_exclusive_bound_becomes_the_next_number() {
    let bounds = |schema: Value| enforced(&schema).unwrap();
    assert_eq!(bounds(json!({"exclusiveMinimum": 1}))["exclusiveMinimum"], json!(1.0f64.next_up()));
    assert_eq!(bounds(json!({"exclusiveMaximum": -1.0}))["exclusiveMaximum"], json!((-1.0f64).next_down()));
    assert_eq!(bounds(json!({"type": "number", "exclusiveMinimum": 0}))["exclusiveMinimum"], json!(1e-15));
    assert_eq!(bounds(json!({"exclusiveMinimum": -1}))["exclusiveMinimum"], json!(-1));
    assert_eq!(bounds(json!({"exclusiveMaximum": 1.5}))["exclusiveMaximum"], json!(1.5));
    assert_eq!(bounds(json!({"type": "integer", "exclusiveMinimum": 0}))["exclusiveMinimum"], json!(0));
}

#[test]
fn formats_may_be_notes() {
    let schema = json!({
        "properties": {
            "format": {"type": "string", "format": "binary"},
            "at": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null", "format": "int32"}]},
        },
        "default": {"format": "binary"},
    });
    assert!(refusal(&schema).contains("\"binary\" is not enforced"));
    let kept = without_notes(&schema).unwrap();
    let at = json!({"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]});
    assert_eq!(kept["properties"], json!({"format": {"type": "string"}, "at": at}));
    // What is left is a schema as any other.
    assert_eq!(enforced(&kept).unwrap(), kept);
    let not = json!({"format": 5});
    assert!(without_notes(&not).is_err(), "a format is a name");
    assert!(without_notes(&json!({"properties": {"a": {"uniqueItems": true}}})).is_err());
}

#[test]
fn documents_are_bounded() {
    let mut deep = json!({});
    for _ in 0..=DEPTH {
        deep = json!({"items": deep});
    }
    assert!(refusal(&deep).contains("nested"));
    let many: Vec<Value> = (0..=SCHEMAS).map(|_| json!({})).collect();
    assert!(refusal(&json!({"anyOf": many})).contains("more than"));
    let long = |bytes: usize| json!({"properties": {"x".repeat(bytes): {"type": "null"}}});
    assert!(refusal(&long(POINTER)).contains("bytes"));
    assert!(enforced(&long(POINTER / 2)).is_ok());
}
