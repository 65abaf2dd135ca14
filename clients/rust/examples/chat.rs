//! A whole answer: `cargo run --example chat`.

use tidewright_client::{ChatRequest, Client, Message, Result};

#[tokio::main]
async fn main() -> Result<()> {
    let client = Client::builder().build()?; // TIDEWRIGHT_URL and TIDEWRIGHT_KEY
    let messages = [Message::system("Be short."), Message::user("Name three fruits.")];
    let answer = client.chat(ChatRequest::new("smollm2-135m", messages).max_tokens(32)).await?;
    println!("{}", answer.text);
    println!("{:?} {:?}", answer.finish_reason, answer.usage);
    Ok(())
}
