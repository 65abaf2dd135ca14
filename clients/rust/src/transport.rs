//! One call over HTTP: attempts until an answer begins, and the rest of a whole answer.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{HeaderMap, ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use reqwest::{Method, Response};
use serde_json::{Map, Value};
use tokio::time::{sleep, timeout_at, Instant};

use crate::client::Inner;
use crate::error::{Error, Kind};
use crate::{failures, retry, Result};

/// Of the body of an error, no more is read.
const LONGEST_ERROR: usize = 1 << 20;

pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) path: &'static str,
    pub(crate) body: Option<Map<String, Value>>,
    pub(crate) streams: bool,
    pub(crate) timeout: Duration,
    pub(crate) deadline: Instant,
}

/// An answer of status 200 and the right type.
pub(crate) struct Begun {
    pub(crate) response: Response,
    /// Of the body; `None`: it is empty.
    pub(crate) first: Option<Bytes>,
    pub(crate) request_id: Option<String>,
}

/// An attempt that failed, and whether another may be made.
struct Failure {
    error: Error,
    is_final: bool,
}

impl Failure {
    fn last(error: Error) -> Self {
        Self { error, is_final: true }
    }
}

impl Inner {
    pub(crate) fn url(&self, call: &Call) -> String {
        format!("{}{}", self.base, call.path)
    }

    /// Attempts until the first byte of a body has come.
    pub(crate) async fn begin(&self, call: &Call, max_retries: u32) -> Result<Begun> {
        self.budget.deposit();
        for retries in 0.. {
            let failure = match self.attempt_in_time(call).await {
                Ok(begun) => return Ok(begun),
                Err(failure) => failure,
            };
            let asked = failure.error.details().retry_after;
            let wait = asked.unwrap_or_else(|| retry::backoff(retries, retry::random()));
            let is_too_long = wait > retry::LONGEST_WAIT || Instant::now() + wait >= call.deadline;
            if failure.is_final || retries >= max_retries || is_too_long || !self.budget.withdraw() {
                return Err(failure.error);
            }
            sleep(wait).await;
        }
        unreachable!("max_retries is finite")
    }

    async fn attempt_in_time(&self, call: &Call) -> Result<Begun, Failure> {
        let silence = Instant::now() + self.idle_timeout;
        let until = if call.streams { call.deadline.min(silence) } else { call.deadline };
        let done = timeout_at(until, self.attempt(call)).await;
        done.unwrap_or_else(|_| {
            Err(Failure::last(if until < call.deadline {
                failures::silent(&self.url(call), self.idle_timeout)
            } else {
                failures::too_late(&self.url(call), call.timeout)
            }))
        })
    }

    async fn attempt(&self, call: &Call) -> Result<Begun, Failure> {
        let url = self.url(call);
        let broken = |error: reqwest::Error| Failure { error: failures::of_connection(&url, &error), is_final: false };
        let mut request = self.http.request(call.method.clone(), &url);
        if let Some(header) = &self.authorization {
            request = request.header(AUTHORIZATION, header.clone());
        }
        request = request.header(ACCEPT, if call.streams { "text/event-stream" } else { "application/json" });
        if let Some(body) = &call.body {
            let json = with_timeout(body, call.deadline);
            request = request.header(CONTENT_TYPE, "application/json").body(json);
        }
        let mut response = request.send().await.map_err(broken)?;
        if !response.status().is_success() {
            return Err(self.refusal(&url, response).await);
        }
        let request_id = header(response.headers(), "x-request-id");
        self.check_type(&url, call, response.headers()).map_err(|error| Failure::last(with_id(error, &request_id)))?;
        let first = response.chunk().await.map_err(broken)?;
        Ok(Begun { response, first, request_id })
    }

    fn check_type(&self, url: &str, call: &Call, headers: &HeaderMap) -> Result<()> {
        let wanted = if call.streams { "text/event-stream" } else { "application/json" };
        let got = header(headers, CONTENT_TYPE.as_str()).unwrap_or_default();
        let kind = got.split(';').next().unwrap_or_default().trim();
        if kind.eq_ignore_ascii_case(wanted) {
            return Ok(());
        }
        Err(failures::another_type(url, wanted, kind))
    }

    /// What an answer says that is none of success.
    async fn refusal(&self, url: &str, mut response: Response) -> Failure {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let request_id = header(&headers, "x-request-id");
        if status < 400 {
            return Failure::last(with_id(failures::of_redirect(url, status, &headers), &request_id));
        }
        let body = read(&mut response, Vec::new(), LONGEST_ERROR).await.unwrap_or_default();
        let mut error = failures::of_status(url, status, &headers, &body, self.key.as_deref());
        let asked = header(&headers, RETRY_AFTER.as_str());
        error.details_mut().retry_after = asked.and_then(|value| retry::retry_after(&value, SystemTime::now()));
        let is_told_not_to =
            header(&headers, "x-should-retry").is_some_and(|value| value.eq_ignore_ascii_case("false"));
        Failure { error: with_id(error, &request_id), is_final: is_told_not_to || !retry::is_retried(status) }
    }

    /// The whole body of an answer that has begun.
    pub(crate) async fn rest(&self, mut begun: Begun, call: &Call) -> Result<Vec<u8>> {
        let (url, most) = (self.url(call), self.max_answer_bytes);
        let told = begun.response.content_length();
        let first = begun.first.take().unwrap_or_default();
        let error = if told.is_some_and(|length| length > most as u64) || first.len() > most {
            failures::too_long(&url, most)
        } else {
            match timeout_at(call.deadline, read(&mut begun.response, first.to_vec(), most)).await {
                Ok(Ok(body)) => return Ok(body),
                Ok(Err(ReadError::TooLong)) => failures::too_long(&url, most),
                Ok(Err(ReadError::Broken(error))) => failures::of_connection(&url, &error),
                Err(_) => failures::too_late(&url, call.timeout),
            }
        };
        Err(with_id(error, &begun.request_id))
    }
}

enum ReadError {
    TooLong,
    Broken(reqwest::Error),
}

async fn read(response: &mut Response, mut body: Vec<u8>, most: usize) -> Result<Vec<u8>, ReadError> {
    while let Some(chunk) = response.chunk().await.map_err(ReadError::Broken)? {
        if body.len() + chunk.len() > most {
            return Err(ReadError::TooLong);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The body as JSON. The gateway is told the time that is left, less some for the way back, unless the caller did.
fn with_timeout(body: &Map<String, Value>, deadline: Instant) -> String {
    let mut body = body.clone();
    let told = told(deadline.saturating_duration_since(Instant::now()));
    body.entry("timeout").or_insert_with(|| ((told * 1000.0).round() / 1000.0).into());
    Value::Object(body).to_string()
}

/// Seconds that the gateway has of what is left: less a margin for the way back, on a busy machine too.
fn told(left: Duration) -> f64 {
    let left = left.as_secs_f64();
    (left - (left / 10.0).clamp(0.5, 2.0).min(left / 2.0)).max(0.001)
}

pub(crate) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?;
    Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
}

fn with_id(mut error: Error, request_id: &Option<String>) -> Error {
    error.details_mut().request_id.clone_from(request_id);
    error
}

/// The error of an event in a stream.
pub(crate) fn kind_of_event(kind: Option<&str>, code: Option<&str>) -> Kind {
    match (kind, code) {
        (_, Some("timeout")) => Error::TimedOut,
        (Some("rate_limit_error"), _) => Error::RateLimited,
        (Some("server_error"), _) => Error::Unavailable,
        _ => Error::InvalidRequest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gateway_is_told_less_than_is_left() {
        for (left, expected) in
            [(600.0, 598.0), (20.0, 18.0), (10.0, 9.0), (4.0, 3.5), (1.0, 0.5), (0.4, 0.2), (0.0, 0.001)]
        {
            assert_eq!(told(Duration::from_secs_f64(left)), expected, "of {left}");
        }
    }
}
