//! A server whose certificate nobody but its owner trusts, at `TIDEWRIGHT_TLS_URL`; `TIDEWRIGHT_CA` is a file with it.

use tidewright_client::{Client, Error};

#[tokio::test]
async fn a_certificate_is_trusted_where_it_is_given() {
    let Ok(url) = std::env::var("TIDEWRIGHT_TLS_URL") else {
        println!("left out: TIDEWRIGHT_TLS_URL names no gateway");
        return;
    };
    let pem = std::fs::read(std::env::var("TIDEWRIGHT_CA").unwrap()).unwrap();
    let client = Client::builder().base_url(&url).trust_certificate(pem).build().unwrap();
    assert!(client.health().await.unwrap());

    let client = Client::builder().base_url(&url).build().unwrap();
    let error = client.health().await.unwrap_err();
    assert!(matches!(error, Error::ConnectionFailed(_)), "{error:?}");
    assert!(error.to_string().contains("trust_certificate"), "{error}");
}
