//! The options of a [`Client`], checked once.

use std::env;
use std::fmt;
use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Url};

use crate::error::Error;
use crate::retry::Budget;
use crate::{Client, Result};

const DEFAULT_URL: &str = "http://127.0.0.1:8080";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Shorter than the gateway keeps idle connections, or a request could meet one that is just being closed.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
pub(crate) const LONGEST_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Options of a [`Client`].
///
/// ```
/// use std::time::Duration;
/// use tidewright_client::Client;
///
/// # fn main() -> tidewright_client::Result<()> {
/// let client = Client::builder()
///     .base_url("http://127.0.0.1:8080")
///     .timeout(Duration::from_secs(60))
///     .max_retries(1)
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct ClientBuilder {
    base_url: Option<String>,
    key: Option<String>,
    max_retries: u32,
    timeout: Duration,
    idle_timeout: Duration,
    max_answer_bytes: usize,
    certificates: Vec<Vec<u8>>,
}

impl fmt::Debug for ClientBuilder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = out.debug_struct("ClientBuilder");
        shown.field("base_url", &self.base_url).finish_non_exhaustive() // not the key
    }
}

impl Default for ClientBuilder {
    fn default() -> Self {
        Self {
            base_url: None,
            key: None,
            max_retries: 2,
            timeout: Duration::from_secs(600),
            idle_timeout: Duration::from_secs(60),
            max_answer_bytes: 64 << 20,
            certificates: Vec::new(),
        }
    }
}

impl ClientBuilder {
    /// The gateway's address, with or without `/v1`. Without it: `TIDEWRIGHT_URL`, else `http://127.0.0.1:8080`.
    pub fn base_url(mut self, url: impl Into<String>) -> Self {
        self.base_url = Some(url.into());
        self
    }

    /// The API key, without the white space around it. Without it: `TIDEWRIGHT_KEY`, else none is sent.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Retries of a request, at most (2). 0: none.
    pub fn max_retries(mut self, most: u32) -> Self {
        self.max_retries = most;
        self
    }

    /// From a call to its last byte, retries included (600 s). The gateway is told to end by itself a little before; if
    /// it is overloaded, [`Error::TimedOut`] may come first.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The longest silence of a stream (60 s). The gateway's keep-alive comments end a silence.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// The longest answer that is taken (64 MiB): bytes of a body, or of the text and tool calls of a stream.
    pub fn max_answer_bytes(mut self, most: usize) -> Self {
        self.max_answer_bytes = most;
        self
    }

    /// Also trusts this certificate, or authority, in PEM: for a gateway whose certificate is the company's own.
    pub fn trust_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.certificates.push(pem.into());
        self
    }

    /// Makes the client. It connects on its first request.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`]: an option or environment variable that can't be used; the message says what to change.
    pub fn build(self) -> Result<Client> {
        let url = self.base_url.or_else(|| variable("TIDEWRIGHT_URL"));
        let base = checked_url(url.as_deref().unwrap_or(DEFAULT_URL))?;
        let key = self.key.or_else(|| variable("TIDEWRIGHT_KEY"));
        let key = key.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty());
        let authorization = key.as_deref().map(checked_key).transpose()?;
        checked_timeout("timeout", self.timeout)?;
        checked_timeout("idle_timeout", self.idle_timeout)?;
        if self.max_answer_bytes == 0 {
            return Err(wrong("max_answer_bytes is 0, so that no answer could be taken".into()));
        }
        let mut http = reqwest::Client::builder()
            .redirect(Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .tcp_nodelay(true)
            .user_agent(concat!("tidewright-client-rust/", env!("CARGO_PKG_VERSION")));
        for pem in &self.certificates {
            let certificate = Certificate::from_pem(pem);
            http = http.add_root_certificate(certificate.map_err(|error| {
                wrong(format!("trust_certificate takes a certificate in PEM (-----BEGIN CERTIFICATE-----): {error}"))
            })?);
        }
        let http = http.build().map_err(|error| wrong(format!("TLS can't be set up: {error}")))?;
        Ok(Client::from_parts(crate::client::Inner {
            http,
            base,
            key,
            authorization,
            max_retries: self.max_retries,
            timeout: self.timeout.min(LONGEST_TIMEOUT),
            idle_timeout: self.idle_timeout.min(LONGEST_TIMEOUT),
            max_answer_bytes: self.max_answer_bytes,
            budget: Budget::new(),
        }))
    }
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn wrong(message: String) -> Error {
    Error::of(Error::InvalidRequest, message)
}

/// No answer comes in no time.
pub(crate) fn checked_timeout(name: &str, timeout: Duration) -> Result<()> {
    if timeout.is_zero() {
        return Err(wrong(format!("{name} is 0: give a time in which an answer can come, or leave it out")));
    }
    Ok(())
}

/// Ends of URLs that people copy from other tools.
const CALLS: [&str; 6] =
    ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/responses", "/v1/messages", "/v1/embeddings"];

/// Without `/v1` and slashes at its end. Errors do not show what may be a password.
fn checked_url(text: &str) -> Result<String> {
    let text = text.trim();
    let advice = "write it as http://HOST:PORT or https://HOST (base_url, or TIDEWRIGHT_URL)";
    if text.contains('@') {
        return Err(wrong(format!("the gateway's URL has a user or password: give the key as `key`, and {advice}")));
    }
    let url =
        Url::parse(text).map_err(|error| wrong(format!("{text:?} is no URL of a gateway ({error}): {advice}")))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(wrong(format!("{text:?} is no URL of a gateway: {advice}")));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong(format!("{text:?} goes on after its path: {advice}")));
    }
    let base = url.as_str().trim_end_matches('/');
    for end in CALLS {
        if base.ends_with(end) {
            return Err(wrong(format!("the gateway's URL is that of one call: leave out {end:?}")));
        }
    }
    Ok(base.strip_suffix("/v1").unwrap_or(base).trim_end_matches('/').to_owned())
}

fn checked_key(key: &str) -> Result<HeaderValue> {
    let header = HeaderValue::from_str(&format!("Bearer {key}"));
    let mut header = header.ok().filter(|_| key.bytes().all(|byte| byte.is_ascii_graphic())).ok_or_else(|| {
        wrong(
            "the key has characters that no key has, such as a space or a line break: is it the whole key of `key` or \
             TIDEWRIGHT_KEY, and nothing else?"
                .into(),
        )
    })?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_may_have_v1_or_not() {
        for (given, base) in [
            ("http://host:1", "http://host:1"),
            ("http://host:1/v1", "http://host:1"),
            (" https://host/v1/ ", "https://host"),
            ("http://host/llm/v1", "http://host/llm"),
            ("http://host/llm//", "http://host/llm"),
        ] {
            assert_eq!(checked_url(given).unwrap(), base, "{given}");
        }
    }

    #[test]
    fn wrong_urls_say_how_to_write_them() {
        for given in ["", "host", "host:8080", "ftp://host", "http://", "http://host?x=1", "http://host:99999", "/v1"] {
            let error = checked_url(given).unwrap_err();
            assert!(matches!(error, Error::InvalidRequest(_)), "{given}: {error:?}");
            assert!(error.to_string().contains("http://HOST:PORT"), "{given}: {error}");
        }
        for end in CALLS {
            let error = checked_url(&format!("https://host/llm{end}/")).unwrap_err();
            assert!(matches!(error, Error::InvalidRequest(_)), "{end}: {error:?}");
            assert!(error.to_string().contains(&format!("leave out {end:?}")), "{end}: {error}");
        }
        let error = checked_url("http://user:secret-1@host").unwrap_err().to_string();
        assert!(error.contains("key") && !error.contains("secret-1"), "{error}");
    }

    #[test]
    fn wrong_keys_are_told_at_once_and_never_shown() {
        for key in ["secret-1\nsecret-2", "secret 1", "secret-\u{e9}", "secret\u{0}"] {
            let error = Client::builder().key(key).build().unwrap_err();
            assert!(matches!(error, Error::InvalidRequest(_)), "{error:?}");
            let error = error.to_string();
            assert!(error.contains("the key has characters that") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn white_space_around_a_key_is_no_part_of_it() {
        for key in ["secret-1\n", " secret-1\r\n"] {
            let client = Client::builder().key(key).build().unwrap();
            assert_eq!(client.inner().authorization.as_ref().unwrap(), "Bearer secret-1");
        }
        assert!(Client::builder().key("\n").build().unwrap().inner().authorization.is_none());
    }

    #[test]
    fn limits_of_0_are_refused_by_name() {
        let zero = Duration::ZERO;
        for (name, builder) in [
            ("timeout", Client::builder().timeout(zero)),
            ("idle_timeout", Client::builder().idle_timeout(zero)),
            ("max_answer_bytes", Client::builder().max_answer_bytes(0)),
        ] {
            let error = builder.build().unwrap_err();
            assert!(matches!(error, Error::InvalidRequest(_)), "{error:?}");
            assert!(error.to_string().starts_with(&format!("{name} is 0")), "{error}");
        }
    }

    #[test]
    fn no_debug_shows_the_key() {
        let builder = Client::builder().base_url("http://host").key("secret-1");
        assert!(!format!("{builder:?} {:?}", builder.clone().build().unwrap()).contains("secret"));
    }

    #[test]
    fn a_file_that_is_no_certificate_is_refused() {
        let error = Client::builder().trust_certificate("hello").build().unwrap_err();
        assert!(error.to_string().contains("BEGIN CERTIFICATE"), "{error}");
    }
}
