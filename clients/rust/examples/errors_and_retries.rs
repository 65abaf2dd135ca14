//! What can go wrong, as types: `cargo run --example errors_and_retries`.

use std::time::Duration;

use tidewright_client::{ChatRequest, Client, Error, Message, Result};

#[tokio::main]
async fn main() -> Result<()> {
    // Overload and broken connections are tried again, twice by default, while nothing of the answer has come.
    let client = Client::builder().max_retries(4).timeout(Duration::from_secs(60)).build()?;
    let request = ChatRequest::new("gpt-9", [Message::user("Name three fruits.")]).max_tokens(32);
    match client.chat(request).await {
        Ok(answer) => println!("{}", answer.text),
        Err(Error::NotFound(details)) => println!("no such model: {}", details.message),
        Err(Error::RateLimited(details)) => println!("ask again in {:?}", details.retry_after),
        Err(Error::TimedOut(_) | Error::Unavailable(_)) => println!("busy: ask again later"),
        Err(error) => return Err(error), // says what to change
    }
    Ok(())
}
