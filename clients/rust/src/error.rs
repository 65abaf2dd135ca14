//! What goes wrong, as types. What each is for stands in the contract of all clients.

use std::fmt;
use std::time::Duration;

use crate::Answer;

/// Why a call failed. Match on the variant; all of them carry [`Details`].
///
/// ```
/// use tidewright_client::Error;
///
/// fn advice(error: &Error) -> String {
///     match error {
///         Error::RateLimited(details) => format!("wait {:?}", details.retry_after),
///         Error::Interrupted(_) => "show what came, and ask again".into(),
///         other => other.to_string(),
///     }
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Status 400, 405, 409, 413, 415, 422, 431, and any other 4xx: change the request. Also what is refused before it is
    /// sent: an option of the client, or a request without a model.
    #[error("{0}")]
    InvalidRequest(Box<Details>),
    /// 401: no key, or one that the gateway does not take.
    #[error("{0}")]
    Unauthenticated(Box<Details>),
    /// 403, 421: the key may not do this.
    #[error("{0}")]
    Forbidden(Box<Details>),
    /// 404: mostly a model's name.
    #[error("{0}")]
    NotFound(Box<Details>),
    /// 429, also in the middle of a stream.
    #[error("{0}")]
    RateLimited(Box<Details>),
    /// 408, or the client's own timeout passed.
    #[error("{0}")]
    TimedOut(Box<Details>),
    /// 500 and more, also in the middle of a stream.
    #[error("{0}")]
    Unavailable(Box<Details>),
    /// No connection, or it broke before an answer: wrong host or port, refused, TLS. The message says what to check.
    #[error("{0}")]
    ConnectionFailed(Box<Details>),
    /// A stream that had begun ended without its end. `partial` is what came.
    #[error("{0}")]
    Interrupted(Box<Details>),
    /// Not an answer of the gateway: a redirect, HTML, JSON of another shape, or more than the client takes.
    #[error("{0}")]
    UnexpectedAnswer(Box<Details>),
}

/// What is known of an error.
#[derive(Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Details {
    /// For people. It never holds the key.
    pub message: String,
    /// HTTP status, where there was an answer.
    pub status: Option<u16>,
    /// The gateway's code, such as `rate_limit_exceeded`.
    pub code: Option<String>,
    /// The field of the request that is wrong.
    pub param: Option<String>,
    /// Names the request in the gateway's logs.
    pub request_id: Option<String>,
    /// The gateway asks to wait this long.
    pub retry_after: Option<Duration>,
    /// What a stream that had begun gave before the error.
    pub partial: Option<Answer>,
}

impl Details {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::default() }
    }
}

/// Without what is absent: it is what a `main` that returns the error shows.
impl fmt::Debug for Details {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = out.debug_struct("Details");
        shown.field("message", &self.message);
        let partial = self.partial.as_ref().map(|partial| partial.text.len()); // it may be millions
        let known: [(&str, Option<&dyn fmt::Debug>); 6] = [
            ("status", self.status.as_ref().map(|status| status as _)),
            ("code", self.code.as_ref().map(|code| code as _)),
            ("param", self.param.as_ref().map(|param| param as _)),
            ("request_id", self.request_id.as_ref().map(|id| id as _)),
            ("retry_after", self.retry_after.as_ref().map(|wait| wait as _)),
            ("bytes_of_partial", partial.as_ref().map(|bytes| bytes as _)),
        ];
        for (name, value) in known {
            if let Some(value) = value {
                shown.field(name, value);
            }
        }
        shown.finish()
    }
}

impl fmt::Display for Details {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)?;
        let status = self.status.map(|status| format!("status {status}"));
        let code = self.code.as_ref().map(|code| format!("code {code}"));
        let request = self.request_id.as_ref().map(|id| format!("request {id}"));
        let known: Vec<String> = [status, code, request].into_iter().flatten().collect();
        if known.is_empty() {
            return Ok(());
        }
        write!(out, " ({})", known.join(", "))
    }
}

/// A variant of [`Error`], to choose one before its details are known.
pub(crate) type Kind = fn(Box<Details>) -> Error;

impl Error {
    pub(crate) fn of(kind: Kind, message: impl Into<String>) -> Self {
        kind(Box::new(Details::new(message)))
    }

    pub(crate) fn of_status(status: u16, details: Details) -> Self {
        let kind: Kind = match status {
            401 => Self::Unauthenticated,
            403 | 421 => Self::Forbidden,
            404 => Self::NotFound,
            408 => Self::TimedOut,
            429 => Self::RateLimited,
            500.. => Self::Unavailable,
            _ => Self::InvalidRequest,
        };
        kind(Box::new(details))
    }

    /// What is known of it.
    pub fn details(&self) -> &Details {
        match self {
            Self::InvalidRequest(details)
            | Self::Unauthenticated(details)
            | Self::Forbidden(details)
            | Self::NotFound(details)
            | Self::RateLimited(details)
            | Self::TimedOut(details)
            | Self::Unavailable(details)
            | Self::ConnectionFailed(details)
            | Self::Interrupted(details)
            | Self::UnexpectedAnswer(details) => details,
        }
    }

    pub(crate) fn details_mut(&mut self) -> &mut Details {
        match self {
            Self::InvalidRequest(details)
            | Self::Unauthenticated(details)
            | Self::Forbidden(details)
            | Self::NotFound(details)
            | Self::RateLimited(details)
            | Self::TimedOut(details)
            | Self::Unavailable(details)
            | Self::ConnectionFailed(details)
            | Self::Interrupted(details)
            | Self::UnexpectedAnswer(details) => details,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_one_sentence_with_what_is_known() {
        let mut details = Details::new("slow down");
        assert_eq!(Error::of_status(429, details.clone()).to_string(), "slow down");
        details.status = Some(429);
        details.request_id = Some("r-1".into());
        assert_eq!(Error::of_status(429, details).to_string(), "slow down (status 429, request r-1)");
    }

    #[test]
    fn what_a_main_shows_is_short() {
        let partial = Answer { text: "a".repeat(1000), ..Answer::default() };
        let details = Details { partial: Some(partial), ..Details::new("gone") };
        let shown = format!("{:?}", Error::Interrupted(Box::new(details)));
        assert_eq!(shown, r#"Interrupted(Details { message: "gone", bytes_of_partial: 1000 })"#);
    }

    #[test]
    fn it_can_cross_threads_and_be_boxed() {
        fn check<T: std::error::Error + Send + Sync + 'static>() {}
        check::<Error>();
    }
}
