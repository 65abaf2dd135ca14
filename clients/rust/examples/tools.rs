//! The model calls a function, and goes on with its result: `cargo run --example tools`.

use serde_json::json;
use tidewright_client::{ChatRequest, Client, Message, Result, Tool};

#[tokio::main]
async fn main() -> Result<()> {
    let client = Client::builder().build()?;
    let parameters =
        json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]});
    let weather = Tool::function("get_weather", "The weather in a city", parameters);
    let question = "What is the weather in Paris?";
    println!("{question}"); // the answer takes a moment
    let mut messages = vec![Message::user(question)];

    let request = ChatRequest::new("smollm2-135m", messages.clone()).tools([weather]).max_tokens(64);
    let request = request.extra("tool_choice", "required").extra("parallel_tool_calls", false);
    let answer = client.chat(request).await?;
    messages.push(Message::from(&answer));
    for call in &answer.tool_calls {
        println!("{}({})", call.name, call.arguments);
        messages.push(Message::tool(&call.id, "18 degrees, sunny"));
    }

    let answer = client.chat(ChatRequest::new("smollm2-135m", messages).max_tokens(32)).await?;
    println!("{}", answer.text);
    Ok(())
}
