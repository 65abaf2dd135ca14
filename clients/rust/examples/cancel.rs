//! A stream that is dropped ends in the server too: `cargo run --example cancel`.

use tidewright_client::{ChatRequest, Client, Event, Message, Result};

#[tokio::main]
async fn main() -> Result<()> {
    let client = Client::builder().build()?;
    let request = ChatRequest::new("smollm2-135m", [Message::user("Count to a thousand.")]).max_tokens(1000);
    let mut stream = client.stream_chat(request).await?;
    let mut seen = String::new();
    while let Some(event) = stream.next().await {
        if let Event::Text(text) = event? {
            seen.push_str(&text);
        }
        if seen.len() > 20 {
            break;
        }
    }
    drop(stream); // closes the connection: the server stops within two steps
    println!("{seen} ...");
    Ok(())
}
