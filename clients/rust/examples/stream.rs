//! An answer as it is made: `cargo run --example stream`.

use std::io::{stdout, Write};

use tidewright_client::{ChatRequest, Client, Event, Message, Result};

#[tokio::main]
async fn main() -> Result<()> {
    let client = Client::builder().build()?;
    let request = ChatRequest::new("smollm2-135m", [Message::user("Name three fruits.")]).max_tokens(32);
    let mut stream = client.stream_chat(request).await?;
    while let Some(event) = stream.next().await {
        if let Event::Text(text) = event? {
            print!("{text}");
            stdout().flush().expect("a terminal");
        }
    }
    println!("\n{:?}", stream.answer().usage);
    Ok(())
}
