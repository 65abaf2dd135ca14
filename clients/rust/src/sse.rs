//! The lines of a stream of server-sent events, from bytes that are cut anywhere.
//!
//! It follows the WHATWG standard, as far as a reader of `data` needs it. It knows nothing of what the data means.

/// A line, or the data of an event, is longer than the limit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

/// Takes bytes by [`feed`](Parser::feed) and gives the data of whole events by [`next`](Parser::next).
#[derive(Debug)]
pub(crate) struct Parser {
    limit: usize,
    buffer: Vec<u8>,
    /// Start of the first line in `buffer` that was not taken.
    line: usize,
    /// No line ends between `line` and here.
    searched: usize,
    data: Vec<u8>,
    has_data: bool,
    is_start: bool,
    /// The last line ended with CR: an LF that follows belongs to it.
    skips_lf: bool,
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl Parser {
    /// `limit`: bytes of a line, and of the data of an event.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            buffer: Vec::new(),
            line: 0,
            searched: 0,
            data: Vec::new(),
            has_data: false,
            is_start: true,
            skips_lf: false,
        }
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.line);
        self.searched -= self.line;
        self.line = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The data of the next event, or `None` until more is fed. Bytes that are not UTF-8 become U+FFFD.
    pub(crate) fn next(&mut self) -> Result<Option<String>, TooLong> {
        while let Some((start, end)) = self.next_line()? {
            if start == end {
                if std::mem::take(&mut self.has_data) {
                    let data = String::from_utf8_lossy(&self.data).into_owned();
                    self.data.clear();
                    return Ok(Some(data));
                }
            } else if let Some(value) = data_of(&self.buffer[start..end]) {
                if self.data.len() + value.len() > self.limit {
                    return Err(TooLong);
                }
                if self.has_data {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
                self.has_data = true;
            }
        }
        Ok(None)
    }

    /// Where the next whole line lies in the buffer, without its end.
    fn next_line(&mut self) -> Result<Option<(usize, usize)>, TooLong> {
        if self.skips_lf && self.line < self.buffer.len() {
            self.skips_lf = false;
            if self.buffer[self.line] == b'\n' {
                self.line += 1;
                self.searched = self.line;
            }
        }
        let found = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n' || byte == b'\r');
        let Some(found) = found else {
            self.searched = self.buffer.len();
            return if self.searched - self.line > self.limit { Err(TooLong) } else { Ok(None) };
        };
        let (mut start, end) = (self.line, self.searched + found);
        if end - start > self.limit {
            return Err(TooLong);
        }
        self.skips_lf = self.buffer[end] == b'\r';
        self.line = end + 1;
        self.searched = self.line;
        if std::mem::take(&mut self.is_start) && self.buffer[start..end].starts_with(BYTE_ORDER_MARK) {
            start += BYTE_ORDER_MARK.len();
        }
        Ok(Some((start, end)))
    }
}

/// The value, if the line is a `data` field.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    match line.strip_prefix(b"data")? {
        [] => Some(b""),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pieces: &[&[u8]]) -> Vec<String> {
        let mut parser = Parser::new(1000);
        let mut found = Vec::new();
        for piece in pieces {
            parser.feed(piece);
            while let Some(data) = parser.next().unwrap() {
                found.push(data);
            }
        }
        found
    }

    const EVERYTHING: &[u8] =
        "\u{feff}: comment\r\n\r\nevent: x\r\nid: 7\r\ndata:one\r\n\r\ndata: two\rdata:  three\r\r\
        data\n\n:\n\ndatax: no\ndata: na\u{ef}ve \u{1f30a}\n\ndata: a\r\ndata: b\ndata: c\r\n\r\ndata: unfinished\n"
            .as_bytes();

    fn of_everything() -> Vec<&'static str> {
        vec!["one", "two\n three", "", "na\u{ef}ve \u{1f30a}", "a\nb\nc"]
    }

    #[test]
    fn everything_in_one_piece() {
        assert_eq!(parse(&[EVERYTHING]), of_everything());
    }

    #[test]
    fn every_cut_into_two_and_three_gives_the_same() {
        for first in 0..=EVERYTHING.len() {
            for second in first..=EVERYTHING.len() {
                let pieces = [&EVERYTHING[..first], &EVERYTHING[first..second], &EVERYTHING[second..]];
                assert_eq!(parse(&pieces), of_everything(), "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn byte_by_byte_gives_the_same() {
        let pieces: Vec<&[u8]> = EVERYTHING.chunks(1).collect();
        assert_eq!(parse(&pieces), of_everything());
    }

    #[test]
    fn an_event_comes_with_its_last_byte() {
        let mut parser = Parser::new(100);
        parser.feed(b"data: a\r\n\r");
        assert_eq!(parser.next(), Ok(Some("a".into())));
        parser.feed(b"\ndata: b\n\n");
        assert_eq!(parser.next(), Ok(Some("b".into())));
        assert_eq!(parser.next(), Ok(None));
    }

    #[test]
    fn a_byte_order_mark_is_dropped_only_at_the_start() {
        assert_eq!(parse(&["data: a\n\n\u{feff}data: b\n\ndata: c\n\n".as_bytes()]), ["a", "c"]);
    }

    #[test]
    fn what_is_no_utf_8_is_replaced() {
        assert_eq!(parse(&[b"data: a\xffb\n\n"]), ["a\u{fffd}b"]);
    }

    #[test]
    fn lines_and_events_have_a_limit() {
        let mut parser = Parser::new(10);
        parser.feed(b"data: 1234");
        assert_eq!(parser.next(), Ok(None));
        parser.feed(b"5");
        assert_eq!(parser.next(), Err(TooLong));

        let mut parser = Parser::new(10);
        parser.feed(b"data: 1234\ndata: 5678\ndata: 901\n\n");
        assert_eq!(parser.next(), Err(TooLong));

        let mut parser = Parser::new(10);
        parser.feed(b": 345678901\n");
        assert_eq!(parser.next(), Err(TooLong));
    }

    #[test]
    fn what_was_taken_is_not_kept() {
        let mut parser = Parser::new(100);
        for _ in 0..10_000 {
            parser.feed(b"data: 0123456789\n\n");
            assert!(parser.next().unwrap().is_some());
        }
        assert!(parser.buffer.capacity() < 1000 && parser.data.capacity() < 1000);
    }
}
