//! Makes the call of a vector, and holds what it gave to what the vector expects.

use std::time::Duration;

use serde_json::{json, Map, Value};
use tidewright_client::{Answer, ChatRequest, Client, CompletionRequest, Error, Event, Message, Stream, Tool};

/// What a call gave.
#[derive(Default)]
pub struct Outcome {
    pub answer: Answer,
    pub events: Vec<Event>,
    pub error: Option<Error>,
    pub is_cancelled: bool,
}

/// A client with the vector's options.
pub fn client(vector: &Value, base_url: &str, key: Option<&str>) -> Client {
    let options = &vector["client"];
    let seconds = |name: &str| options[name].as_f64().map(Duration::from_secs_f64);
    let mut builder = Client::builder().base_url(base_url).key(options["key"].as_str().or(key).unwrap_or_default());
    if let Some(most) = options["max_retries"].as_u64() {
        builder = builder.max_retries(most as u32);
    }
    if let Some(timeout) = seconds("timeout") {
        builder = builder.timeout(timeout);
    }
    if let Some(timeout) = seconds("idle_timeout") {
        builder = builder.idle_timeout(timeout);
    }
    if let Some(most) = options["max_answer_bytes"].as_u64() {
        builder = builder.max_answer_bytes(most as usize);
    }
    builder.build().unwrap()
}

/// The vector's call, as often as it asks for; the last one's outcome.
pub async fn play(vector: &Value, client: &Client, model: &str) -> Outcome {
    let mut outcome = Outcome::default();
    for _ in 0..vector["act"]["repeat"].as_u64().unwrap_or(1) {
        outcome = play_once(vector, client, model).await;
    }
    outcome
}

async fn play_once(vector: &Value, client: &Client, model: &str) -> Outcome {
    let is_stream = vector["stream"] == true;
    let answer = match vector["api"].as_str().unwrap() {
        "models" => client.models().await.map(|models| {
            let mut answer = Answer::default();
            answer.text = models.iter().map(|model| model.id.as_str()).collect::<Vec<_>>().join("\n");
            answer
        }),
        "chat" if is_stream => match client.stream_chat(chat(vector, model)).await {
            Ok(stream) => return read(vector, stream).await,
            Err(error) => Err(error),
        },
        "complete" if is_stream => match client.stream_complete(completion(vector, model)).await {
            Ok(stream) => return read(vector, stream).await,
            Err(error) => Err(error),
        },
        "chat" => client.chat(chat(vector, model)).await,
        _ => client.complete(completion(vector, model)).await,
    };
    match answer {
        Ok(answer) => Outcome { answer, ..Outcome::default() },
        Err(error) => Outcome { error: Some(error), ..Outcome::default() },
    }
}

/// The same request without streaming.
pub async fn play_whole(vector: &Value, client: &Client, model: &str) -> Answer {
    let mut vector = vector.clone();
    vector["stream"] = false.into();
    play_once(&vector, client, model).await.answer
}

async fn read(vector: &Value, mut stream: Stream) -> Outcome {
    let act = &vector["act"];
    let mut outcome = Outcome::default();
    while let Some(event) = stream.next().await {
        match event {
            Ok(event) => outcome.events.push(event),
            Err(error) => {
                outcome.error = Some(error);
                assert!(stream.next().await.is_none(), "an error ends a stream");
                break;
            }
        }
        let count = outcome.events.len() as u64;
        if act["pause_after_events"] == count {
            tokio::time::sleep(Duration::from_secs_f64(act["seconds"].as_f64().unwrap())).await;
            outcome.is_cancelled = act["then"] == "cancel";
        }
        if outcome.is_cancelled || act["cancel_after_events"] == count {
            outcome.is_cancelled = true;
            break; // drops the stream
        }
    }
    outcome.answer = stream.into_answer();
    outcome
}

fn chat(vector: &Value, model: &str) -> ChatRequest {
    let mut fields = fields(vector);
    let messages = list(fields.remove("messages")).into_iter().map(Message::from);
    let model = fields.remove("model").map_or(model.to_owned(), |model| model.as_str().unwrap().to_owned());
    let mut request = ChatRequest::new(model, messages);
    if let Some(tools) = fields.remove("tools") {
        request = request.tools(list(Some(tools)).into_iter().map(Tool::from));
    }
    for (name, value) in fields {
        request = match (name.as_str(), value.as_u64(), value.as_f64()) {
            ("max_tokens", Some(most), _) => request.max_tokens(most as u32),
            ("temperature", _, Some(temperature)) => request.temperature(temperature),
            _ => request.extra(name, value),
        };
    }
    request
}

fn completion(vector: &Value, model: &str) -> CompletionRequest {
    let mut fields = fields(vector);
    let prompt = fields.remove("prompt").unwrap();
    let mut request = CompletionRequest::new(model, prompt.as_str().unwrap());
    for (name, value) in fields {
        request = match (name.as_str(), value.as_u64(), value.as_f64()) {
            ("max_tokens", Some(most), _) => request.max_tokens(most as u32),
            ("temperature", _, Some(temperature)) => request.temperature(temperature),
            _ => request.extra(name, value),
        };
    }
    request
}

fn fields(vector: &Value) -> Map<String, Value> {
    let mut fields = vector["request"].as_object().unwrap().clone();
    if let Some(Value::Object(extra)) = fields.remove("extra") {
        fields.extend(extra);
    }
    fields
}

fn list(value: Option<Value>) -> Vec<Value> {
    serde_json::from_value(value.unwrap()).unwrap()
}

/// What of the outcome is not as expected.
pub fn faults(vector: &Value, outcome: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    let expect = vector["expect"].as_object().cloned().unwrap_or_default();
    match (&outcome.error, expect.get("error")) {
        (Some(error), Some(expected)) => return faults_of_error(expected, error),
        (Some(error), None) => found.push(format!("an error: {error:?}")),
        (None, Some(expected)) => found.push(format!("no error, not {expected}")),
        (None, None) => {}
    }
    for (name, expected) in &expect {
        let answer = &outcome.answer;
        let got = match name.as_str() {
            "text" => json!(answer.text),
            "text_length" => json!(answer.text.chars().count()),
            "finish_reason" => json!(answer.finish_reason),
            "ended_by" => json!(answer.ended_by),
            "served_by" => json!(answer.served_by),
            "request_id" => json!(answer.request_id),
            "usage" => answer.usage.as_ref().map_or(Value::Null, |usage| {
                let (prompt, completion) = (usage.prompt_tokens, usage.completion_tokens);
                json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": usage.total_tokens})
            }),
            "tool_calls" => {
                let calls = answer.tool_calls.iter();
                calls.map(|call| json!({"id": call.id, "name": call.name, "arguments": call.arguments})).collect()
            }
            "events" => outcome.events.iter().map(shown).collect(),
            "checks" => continue, // of a real gateway
            other => panic!("the vectors expect {other}, which this suite does not know"),
        };
        if got != *expected {
            let short: String = got.to_string().chars().take(300).collect();
            found.push(format!("{name}: {short}, not {expected}"));
        }
    }
    found
}

fn shown(event: &Event) -> Value {
    match event {
        Event::Text(text) => json!(["text", text]),
        Event::ToolCall(delta) => json!(["tool_call", delta.index, delta.id, delta.name, delta.arguments]),
        Event::Finish { reason, .. } => json!(["finish", reason]),
        Event::Usage(_) => json!(["usage"]),
        other => panic!("an event that this suite does not know: {other:?}"),
    }
}

fn faults_of_error(expected: &Value, error: &Error) -> Vec<String> {
    let mut found = Vec::new();
    let (details, shown) = (error.details(), format!("{error} {error:?}"));
    for (name, value) in expected.as_object().unwrap() {
        let texts = || value.as_array().unwrap().iter().map(|text| text.as_str().unwrap());
        let got = match name.as_str() {
            "type" => json!(format!("{error:?}").split('(').next()),
            "status" => json!(details.status),
            "code" => json!(details.code),
            "param" => json!(details.param),
            "request_id" => json!(details.request_id),
            "retry_after" => json!(details.retry_after.map(|wait| wait.as_secs())),
            "partial_text" => json!(details.partial.as_ref().map(|partial| &partial.text)),
            "message_has" if texts().all(|text| details.message.contains(text)) => continue,
            "message_lacks" if !texts().any(|text| shown.contains(text)) => continue,
            "message_has" | "message_lacks" => json!(details.message),
            other => panic!("the vectors expect {other} of an error, which this suite does not know"),
        };
        if got != *value {
            found.push(format!("{name}: {got}, not {value} ({error})"));
        }
    }
    found
}
