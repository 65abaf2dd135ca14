//! The words of errors: what happened where, and what to check.

use std::error::Error as _;
use std::time::Duration;

use reqwest::header::{HeaderMap, CONTENT_TYPE, LOCATION};
use reqwest::Url;

use crate::error::{Details, Error};
use crate::transport::{header, kind_of_event};
use crate::wire::{error_of, ErrorBody};

/// There is no connection, or it broke before an answer.
pub(crate) fn of_connection(url: &str, error: &reqwest::Error) -> Error {
    let host = host_of(url);
    let cause = causes(error);
    let found = cause.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| found.contains(word));
    let advice = if has(&["certificate", "unknownissuer"]) {
        "its certificate is not trusted, or not for this host: give the authority's by `trust_certificate`, and write the \
         host as the certificate does"
    } else if has(&[
        "wrong version number",
        "corrupt message",
        "invalidcontenttype",
        "packet length",
        "ssl",
        "tls",
        "handshake",
    ]) {
        "TLS failed: if the gateway serves plain HTTP there, the URL begins with http://"
    } else if has(&["dns", "lookup", "resolve"]) {
        "the host's name is not known: check the URL (base_url, or TIDEWRIGHT_URL)"
    } else if has(&["refused"]) {
        "nothing listens there: check that the gateway runs, and the URL's port (base_url, or TIDEWRIGHT_URL)"
    } else if error.is_connect() {
        "check the URL (base_url, or TIDEWRIGHT_URL), the network, and a proxy between"
    } else {
        "ask again; if this always happens, the port is not the gateway's HTTP port: with TLS the URL begins with \
         https://, and Triton's own ports (8000 to 8002) are not the gateway's (8080)"
    };
    let what = if error.is_connect() { "no connection to" } else { "the connection broke before an answer of" };
    Error::of(Error::ConnectionFailed, format!("{what} {host}: {cause}; {advice}"))
}

pub(crate) fn too_late(url: &str, timeout: Duration) -> Error {
    let (host, timeout) = (host_of(url), timeout.as_secs_f64());
    Error::of(Error::TimedOut, format!("{host} gave no whole answer within the timeout of {timeout} s"))
}

pub(crate) fn silent(url: &str, timeout: Duration) -> Error {
    let (host, timeout) = (host_of(url), timeout.as_secs_f64());
    Error::of(Error::TimedOut, format!("nothing came from {host} within the idle_timeout of {timeout} s"))
}

pub(crate) fn too_long(url: &str, most: usize) -> Error {
    let message = format!("the answer of {url} is longer than max_answer_bytes, {most} bytes");
    Error::of(Error::UnexpectedAnswer, message)
}

pub(crate) fn another_type(url: &str, wanted: &str, got: &str) -> Error {
    let got = if got.is_empty() { "no type" } else { got };
    let message =
        format!("{url} answered with {got}, not {wanted}: is this the gateway, or a proxy or another server?");
    Error::of(Error::UnexpectedAnswer, message)
}

pub(crate) fn another_shape(url: &str, why: &str, request_id: Option<String>) -> Error {
    let message = format!("the JSON of {url} is no answer of the gateway: {why}; is it the gateway's address?");
    let mut error = Error::of(Error::UnexpectedAnswer, message);
    error.details_mut().request_id = request_id;
    error
}

pub(crate) fn of_redirect(url: &str, status: u16, headers: &HeaderMap) -> Error {
    let target = header(headers, LOCATION.as_str()).and_then(|target| Url::parse(url).ok()?.join(&target).ok());
    let message = match target {
        Some(target) => format!(
            "{url} redirects to {}, which is not followed, as the key would go there; if that is the gateway, give its \
             URL",
            host_of(target.as_str())
        ),
        None => format!("{url} answered {status}, which is no answer of the gateway"),
    };
    let mut error = Error::of(Error::UnexpectedAnswer, message);
    error.details_mut().status = Some(status);
    error
}

/// Of status 400 or more.
pub(crate) fn of_status(url: &str, status: u16, headers: &HeaderMap, body: &[u8], key: Option<&str>) -> Error {
    let mut details = match error_of(body) {
        Some(error) => details_of(error, key),
        None => {
            let kind = header(headers, CONTENT_TYPE.as_str()).unwrap_or_else(|| "no body".into());
            let advice = match status {
                404 | 405 => {
                    "is it the gateway's address? Triton's own ports (8000 to 8002) are not the gateway's (8080)"
                }
                400 => "does the gateway serve TLS there? Then the URL begins with https://",
                _ => "a proxy before the gateway, or another server?",
            };
            Details::new(format!("{url} answered {status} with {kind}, not an error of the gateway: {advice}"))
        }
    };
    if status == 401 && key.is_none() {
        details.message += "; no key was sent: give one by ClientBuilder::key, or in TIDEWRIGHT_KEY";
    } else if status == 401 {
        details.message += "; the key is that of ClientBuilder::key, or of TIDEWRIGHT_KEY";
    }
    details.status = Some(status);
    Error::of_status(status, details)
}

/// Of an event in a stream.
pub(crate) fn of_event(error: ErrorBody, key: Option<&str>) -> Error {
    let kind = kind_of_event(error.kind.as_deref(), error.code.as_deref());
    kind(Box::new(details_of(error, key)))
}

fn details_of(error: ErrorBody, key: Option<&str>) -> Details {
    let message = error.message.unwrap_or_else(|| "the gateway gave no message".into());
    Details {
        message: key.map_or(message.clone(), |key| message.replace(key, "(the key)")),
        code: error.code,
        param: error.param,
        ..Details::default()
    }
}

/// Host and port.
fn host_of(url: &str) -> String {
    let Ok(url) = Url::parse(url) else {
        return url.to_owned();
    };
    let host = url.host_str().unwrap_or_default();
    url.port_or_known_default().map_or(host.to_owned(), |port| format!("{host}:{port}"))
}

/// The innermost causes say most: reqwest's own words only repeat the URL.
fn causes(error: &reqwest::Error) -> String {
    let mut found = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string().replace("error trying to connect: ", "");
        if !found.iter().any(|other: &String| other.contains(&text)) {
            found.push(text);
        }
        cause = error.source();
    }
    if found.is_empty() {
        return error.to_string();
    }
    found.join(": ")
}
