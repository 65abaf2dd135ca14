//! What the contract says and no vector can: clients that make several calls, and callers that go.

mod support;

use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;

use support::Scripted;
use tidewright_client::{ChatRequest, Client, ClientBuilder, Error, Event, Message};
use tokio::time::{sleep, timeout};

fn request() -> ChatRequest {
    ChatRequest::new("scripted", [Message::user("Hi")])
}

async fn client_of(scripted: &Scripted, vector: &str) -> (String, ClientBuilder) {
    let base_url = scripted.run(vector).await;
    (base_url.clone(), Client::builder().base_url(base_url))
}

#[tokio::test]
async fn a_client_in_an_outage_makes_ten_retries_for_all_its_calls() {
    let scripted = Scripted::start();
    let (base_url, builder) = client_of(&scripted, "retries_end").await;
    let client = builder.max_retries(2).build().unwrap();
    let calls: Vec<_> = (0..9)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.chat(request()).await })
        })
        .collect();
    for call in calls {
        assert!(matches!(call.await.unwrap(), Err(Error::Unavailable(_))));
    }
    let faults = scripted.verdict(&base_url).await;
    assert!(faults[0].starts_with("requests: 19, not 2"), "{faults:?}");
}

#[tokio::test]
async fn a_call_that_is_dropped_closes_its_connection() {
    let scripted = Scripted::start();
    let (base_url, builder) = client_of(&scripted, "timeout_of_a_silent_server").await;
    let client = builder.build().unwrap();
    assert!(timeout(Duration::from_secs(1), client.stream_chat(request())).await.is_err());
    assert_eq!(scripted.verdict(&base_url).await, [""; 0]);
}

#[tokio::test]
async fn a_reader_that_rests_is_no_silence_of_the_gateway() {
    let scripted = Scripted::start();
    let (_, builder) = client_of(&scripted, "slow_reader_loses_nothing").await;
    let client = builder.idle_timeout(Duration::from_millis(1500)).build().unwrap();
    let mut stream = client.stream_chat(request()).await.unwrap();
    let mut count = 0;
    while let Some(event) = stream.next().await {
        event.unwrap();
        count += 1;
        if count == 4000 {
            sleep(Duration::from_millis(2500)).await;
        }
    }
    assert_eq!(stream.answer().text.len(), 12_000_000);
}

#[tokio::test]
async fn a_silence_from_the_beginning_is_a_timeout() {
    let scripted = Scripted::start();
    let (_, builder) = client_of(&scripted, "timeout_of_a_silent_server").await;
    let client = builder.idle_timeout(Duration::from_millis(300)).build().unwrap();
    let error = client.stream_chat(request()).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut(_)) && error.to_string().contains("idle_timeout"), "{error:?}");
}

#[tokio::test]
async fn a_request_has_a_timeout_of_its_own() {
    let scripted = Scripted::start();
    let (_, builder) = client_of(&scripted, "timeout_in_the_middle").await;
    let request = request().timeout(Duration::from_millis(1500));
    let mut stream = builder.build().unwrap().stream_chat(request).await.unwrap();
    let error = loop {
        if let Err(error) = stream.next().await.unwrap() {
            break error;
        }
    };
    let partial = error.details().partial.clone().unwrap();
    assert!(matches!(error, Error::TimedOut(_)) && partial.text.starts_with('a'), "{error:?}");
}

#[tokio::test]
async fn it_is_a_stream_for_the_crates_of_futures() {
    let scripted = Scripted::start();
    let (_, builder) = client_of(&scripted, "stream_of_texts").await;
    let mut stream = builder.build().unwrap().stream_chat(request()).await.unwrap();
    let first = poll_fn(|context| futures_core::Stream::poll_next(Pin::new(&mut stream), context)).await;
    assert_eq!(first.unwrap().unwrap(), Event::Text("Hel".into()));
}

#[tokio::test]
async fn health_is_a_yes_a_no_or_no_gateway() {
    let scripted = Scripted::start();
    let health = |vector| {
        let client = client_of(&scripted, vector);
        async move { client.await.1.build().unwrap().health().await }
    };
    assert!(health("models").await.unwrap());
    assert!(!health("error_503_unavailable").await.unwrap());
    assert!(matches!(health("not_the_gateway").await, Err(Error::UnexpectedAnswer(_))));
    assert!(matches!(health("refused_to_the_end").await, Err(Error::ConnectionFailed(_))));
}

#[tokio::test]
async fn a_key_that_the_gateway_repeats_is_not_shown() {
    let scripted = Scripted::start();
    let (_, builder) = client_of(&scripted, "key_is_sent").await;
    let error = builder.key("unknown").build().unwrap().chat(request()).await.unwrap_err();
    let message = &error.details().message;
    assert!(message.starts_with("(the key) key; ") && message.contains("TIDEWRIGHT_KEY"), "{message}");
}

#[tokio::test]
async fn a_stream_that_breaks_says_what_to_do() {
    let scripted = Scripted::start();
    for vector in ["no_retry_after_the_first_byte", "ends_without_its_end", "closes_in_the_middle"] {
        let (_, builder) = client_of(&scripted, vector).await;
        let mut stream = builder.build().unwrap().stream_chat(request()).await.unwrap();
        let error = loop {
            if let Err(error) = stream.next().await.unwrap() {
                break error;
            }
        };
        assert!(error.to_string().contains("ask again: `partial` has what came"), "{vector}: {error}");
    }
}
