//! Tools and which of them may or must be called.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use crate::error::{ApiError, shorten};

/// OpenAI's bound on a function's name.
const MAX_NAME: usize = 64;
/// OpenAI's bound on tools.
const MAX_TOOLS: usize = 128;

/// What a request says of tools.
#[derive(Debug, Default)]
pub(crate) struct Tools {
    /// As they came, for the template; none when no call may be made.
    pub(crate) told: Option<Vec<Json>>,
    /// Those that may be called.
    pub(crate) functions: Vec<Function>,
    /// One must be called.
    pub(crate) must: bool,
    /// Several calls may follow one another.
    pub(crate) several: bool,
}

/// A function that may be called.
#[derive(Debug, PartialEq)]
pub(crate) struct Function {
    /// Its name.
    pub(crate) name: String,
    /// The schema of its arguments, an object's.
    pub(crate) parameters: Json,
    /// Arguments that do not fit the schema are worth an error.
    pub(crate) strict: bool,
    /// Its place in the request's list.
    pub(crate) place: usize,
}

/// Checks `tools`, `tool_choice` and `parallel_tool_calls`.
pub(crate) fn tools(
    list: Option<Vec<Json>>,
    choice: Option<&Json>,
    parallel: Option<bool>,
) -> Result<Tools, ApiError> {
    let told = told(list)?;
    let all = told.iter().flatten().enumerate().map(|(place, tool)| function(place, tool));
    let mut functions = all.collect::<Result<Vec<_>, _>>()?;
    let mut seen = HashSet::new();
    if let Some(twice) = functions.iter().find(|function| !seen.insert(function.name.as_str())) {
        let what = format!("{:?} is the name of a tool before it; names must differ", twice.name);
        return Err(ApiError::invalid(format!("tools[{}].function.name", twice.place), what));
    }
    let must = match Choice::of(choice)? {
        Choice::None => return Ok(Tools::default()),
        Choice::Auto => false,
        Choice::Required => true,
        Choice::Some { names, must } => {
            for (param, name) in &names {
                if !functions.iter().any(|function| function.name == *name) {
                    let what = format!("{:?} is the name of no tool in `tools`", shorten(name));
                    return Err(ApiError::invalid(param.clone(), what));
                }
            }
            functions.retain(|function| names.iter().any(|(_, name)| *name == function.name));
            must
        }
    };
    if must && functions.is_empty() {
        return Err(ApiError::invalid(
            "tool_choice",
            "it requires a call, but `tools` holds no tool to call",
        ));
    }
    // A named function is called once.
    let named = choice.is_some_and(|choice| choice["type"] == "function");
    Ok(Tools { told, functions, must, several: parallel.unwrap_or(true) && !named })
}

/// The tools, checked but otherwise as they came; an empty list is none, and a null as if it were not there.
pub(crate) fn told(tools: Option<Vec<Json>>) -> Result<Option<Vec<Json>>, ApiError> {
    let Some(mut tools) = tools.filter(|tools| !tools.is_empty()) else { return Ok(None) };
    if tools.len() > MAX_TOOLS {
        let what = format!("{} tools were given; at most {MAX_TOOLS} are allowed", tools.len());
        return Err(ApiError::invalid("tools", what));
    }
    for (i, tool) in tools.iter().enumerate() {
        if tool.get("type").and_then(Json::as_str) != Some("function") {
            return Err(ApiError::invalid(format!("tools[{i}].type"), "it must be \"function\""));
        }
        let name = tool.get("function").and_then(|f| f.get("name")).and_then(Json::as_str);
        if !name.is_some_and(is_name) {
            return Err(ApiError::invalid(
                format!("tools[{i}].function.name"),
                format!("it must be a string of 1 to {MAX_NAME} letters, digits, `_` and `-`"),
            ));
        }
        if !matches!(tool["function"].get("description"), None | Some(Json::Null | Json::String(_))) {
            return Err(ApiError::invalid(format!("tools[{i}].function.description"), "it must be a string"));
        }
    }
    for tool in &mut tools {
        // Models would read it.
        tool["function"].as_object_mut().into_iter().for_each(|f| f.retain(|_, value| !value.is_null()));
        tool.as_object_mut().into_iter().for_each(|tool| tool.retain(|_, value| !value.is_null()));
    }
    Ok(Some(tools))
}

fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(fits)
}

fn function(place: usize, tool: &Json) -> Result<Function, ApiError> {
    let function = &tool["function"];
    let param = |field: &str| format!("tools[{place}].function.{field}");
    let strict = match &function["strict"] {
        Json::Null => false,
        Json::Bool(strict) => *strict,
        _ => return Err(ApiError::invalid(param("strict"), "it must be true or false")),
    };
    let parameters = match &function["parameters"] {
        Json::Null => json!({"type": "object", "properties": {}, "additionalProperties": false}),
        Json::Object(schema) => arguments(schema).ok_or_else(|| {
            ApiError::invalid(
                param("parameters"),
                "it must be the JSON schema of an object, with \"type\": \"object\"",
            )
        })?,
        _ => return Err(ApiError::invalid(param("parameters"), "it must be an object, a JSON schema")),
    };
    let name = function["name"].as_str().unwrap_or_default().to_owned();
    Ok(Function { name, parameters, strict, place })
}

/// The schema that a function's arguments are held to, if it is one of objects: they are objects, and where the
/// schema lists their properties and is silent on others, there are no others. Any schema of objects allows that,
/// and a model that may make up properties does.
fn arguments(schema: &Map<String, Json>) -> Option<Json> {
    let mut schema = schema.clone();
    match schema.get("type") {
        Some(kind) if kind == "object" || kind == &json!(["object"]) => {}
        Some(_) => return None,
        None => {
            schema.insert("type".into(), "object".into());
        }
    }
    // Keywords by which other properties come in.
    let open = [
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "propertyNames",
        "minProperties",
    ];
    let combined =
        ["allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas", "dependencies"];
    let silent = !open.iter().chain(&combined).any(|keyword| schema.contains_key(*keyword));
    if let Some(Json::Object(properties)) = schema.get("properties").filter(|_| silent) {
        let required = schema.get("required").and_then(Json::as_array).map_or(&[][..], Vec::as_slice);
        let listed = |name: &Json| name.as_str().is_some_and(|name| properties.contains_key(name));
        if required.iter().all(listed) {
            schema.insert("additionalProperties".into(), false.into());
        }
    }
    Some(schema.into())
}

/// `tool_choice`.
enum Choice {
    None,
    Auto,
    Required,
    /// Of these only, each with the `param` that named it.
    Some {
        names: Vec<(String, String)>,
        must: bool,
    },
}

impl Choice {
    fn of(choice: Option<&Json>) -> Result<Self, ApiError> {
        const ALLOWED: &str =
            "it must be `none`, `auto`, `required`, or an object that names a function or `allowed_tools`";
        let unknown = |what: &Json| {
            ApiError::invalid("tool_choice", format!("{} is unknown; {ALLOWED}", shorten(&what.to_string())))
        };
        match choice {
            None | Some(Json::Null) => Ok(Self::Auto),
            Some(Json::String(word)) => match word.as_str() {
                "none" => Ok(Self::None),
                "auto" => Ok(Self::Auto),
                "required" => Ok(Self::Required),
                _ => Err(unknown(&json!(word))),
            },
            Some(object) if object["type"] == "function" => {
                let name = named(object, "tool_choice.function.name")?;
                Ok(Self::Some { names: vec![name], must: true })
            }
            Some(object) if object["type"] == "allowed_tools" => Self::allowed(&object["allowed_tools"]),
            Some(other) => Err(unknown(other)),
        }
    }

    fn allowed(allowed: &Json) -> Result<Self, ApiError> {
        let must = match allowed["mode"].as_str() {
            Some("auto") => false,
            Some("required") => true,
            _ => {
                let what = "it must be `auto` or `required`";
                return Err(ApiError::invalid("tool_choice.allowed_tools.mode", what));
            }
        };
        let param = "tool_choice.allowed_tools.tools";
        let Some(tools) = allowed["tools"].as_array().filter(|tools| !tools.is_empty()) else {
            return Err(ApiError::invalid(param, "it must be a list of at least one tool"));
        };
        let names =
            tools.iter().enumerate().map(|(i, tool)| named(tool, &format!("{param}[{i}].function.name")));
        Ok(Self::Some { names: names.collect::<Result<_, _>>()?, must })
    }
}

/// The name in `{"type":"function","function":{"name":…}}`, with its `param`.
fn named(tool: &Json, param: &str) -> Result<(String, String), ApiError> {
    let name = tool["function"]["name"].as_str();
    let name = name.ok_or_else(|| ApiError::invalid(param, "it must be the name of a tool, a string"))?;
    Ok((param.to_owned(), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Json {
        json!({"type": "function", "function": {"name": name, "x": 1, "a": 2}})
    }

    #[expect(clippy::needless_pass_by_value, reason = "called with json! in place")]
    fn check(list: Json, choice: Json) -> Result<Tools, ApiError> {
        tools(serde_json::from_value(list).unwrap(), Some(&choice), None)
    }

    fn param(list: Json, choice: Json) -> String {
        check(list, choice).unwrap_err().body().error.param.unwrap()
    }

    fn names(tools: &Tools) -> Vec<&str> {
        tools.functions.iter().map(|function| function.name.as_str()).collect()
    }

    #[test]
    fn tools_keep_their_shape() {
        let list = vec![tool("f")];
        assert_eq!(told(Some(list.clone())).unwrap(), Some(list));
        let mut nulls = tool("f");
        (nulls["function"]["description"], nulls["x"]) = (json!(null), json!(null));
        assert_eq!(told(Some(vec![nulls])).unwrap(), Some(vec![tool("f")]));
        assert_eq!(told(Some(vec![])).unwrap(), None);
        assert!(told(None).unwrap().is_none());
    }

    #[test]
    fn bad_tools_are_named() {
        let with = |field: &str, value: Json| {
            let mut tool = tool("f");
            tool["function"][field] = value;
            param(json!([tool]), json!("auto"))
        };
        assert_eq!(param(json!([{"type": "web"}]), json!(null)), "tools[0].type");
        for name in [json!(null), json!(""), json!(7), json!("a b"), json!("é"), json!("x".repeat(65))] {
            assert_eq!(with("name", name), "tools[0].function.name");
        }
        for schema in
            [json!([]), json!("object"), json!({"type": "string"}), json!({"type": ["object", "null"]})]
        {
            assert_eq!(with("parameters", schema), "tools[0].function.parameters");
        }
        assert_eq!(with("strict", json!("yes")), "tools[0].function.strict");
        assert_eq!(param(json!([tool("f"), tool("g"), tool("f")]), json!(null)), "tools[2].function.name");
        assert_eq!(param(json!(vec![tool("f"); 129]), json!(null)), "tools");
        assert!(told(Some(vec![tool(&"x".repeat(64))])).is_ok());
    }

    #[test]
    fn choices() {
        let two = || json!([tool("f"), tool("g")]);
        let auto = check(two(), json!(null)).unwrap();
        assert!(!auto.must && auto.several && auto.told.is_some());
        assert_eq!(names(&auto), ["f", "g"]);
        let none = check(two(), json!("none")).unwrap();
        assert!(none.told.is_none() && none.functions.is_empty() && !none.must);
        let required = check(two(), json!("required")).unwrap();
        assert!(required.must && required.several && names(&required).len() == 2);
        let named = check(two(), json!({"type": "function", "function": {"name": "g"}})).unwrap();
        assert!(named.must && !named.several && named.told.unwrap().len() == 2);
        let allowed = |mode: &str| json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [tool("g")]}});
        let some = check(two(), allowed("required")).unwrap();
        assert!(some.must && some.several);
        assert_eq!(names(&some), ["g"]);
        assert!(!check(two(), allowed("auto")).unwrap().must);
        assert!(!tools(None, None, Some(false)).unwrap().several);
    }

    #[test]
    fn bad_choices_are_named() {
        let one = || json!([tool("f")]);
        for choice in [json!("any"), json!(1), json!({}), json!({"type": "web"}), json!([])] {
            assert_eq!(param(one(), choice), "tool_choice");
        }
        assert_eq!(param(json!([]), json!("required")), "tool_choice");
        let unknown = json!({"type": "function", "function": {"name": "g"}});
        assert_eq!(param(one(), unknown), "tool_choice.function.name");
        assert_eq!(param(one(), json!({"type": "function"})), "tool_choice.function.name");
        let allowed =
            |allowed: Json| param(one(), json!({"type": "allowed_tools", "allowed_tools": allowed}));
        assert_eq!(allowed(json!({"tools": [tool("f")]})), "tool_choice.allowed_tools.mode");
        assert_eq!(allowed(json!({"mode": "auto", "tools": []})), "tool_choice.allowed_tools.tools");
        let unknown = json!({"mode": "auto", "tools": [tool("f"), tool("g")]});
        assert_eq!(allowed(unknown), "tool_choice.allowed_tools.tools[1].function.name");
    }

    #[test]
    fn arguments_are_objects_without_what_is_not_listed() {
        let schema = |schema: Json| arguments(schema.as_object().unwrap()).unwrap();
        let closed = json!({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": false});
        assert_eq!(schema(json!({"properties": {"a": {}}, "required": ["a"]})), closed);
        for open in [
            json!({"type": "object"}),
            json!({"type": "object", "properties": {"a": {}}, "additionalProperties": true}),
            json!({"type": "object", "properties": {"a": {}}, "required": ["b"]}),
            json!({"type": "object", "properties": {"a": {}}, "allOf": [{"required": ["b"]}]}),
        ] {
            assert_eq!(schema(open.clone()), open);
        }
        let none = function(0, &tool("f")).unwrap();
        assert_eq!(none.parameters["additionalProperties"], false);
    }
}
