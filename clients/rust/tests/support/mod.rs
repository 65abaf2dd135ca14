//! The scripted gateway.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::{json, Value};

/// `clients/conformance`.
pub fn conformance() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance")
}

/// A process of `scripted.py`. It ends with its standard input: with this process, whatever happens.
pub struct Scripted {
    process: Child,
    url: String,
}

impl Scripted {
    pub fn start() -> Self {
        let script = conformance().join("scripted.py");
        let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
        let mut process = Command::new(python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the scripted gateway needs Python 3.10 or later: python3, or the one that PYTHON names");
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).expect("its address");
        let url = said["url"].as_str().unwrap().to_owned();
        Self { process, url }
    }

    /// The base URL of a run.
    pub async fn run(&self, vector: &str) -> String {
        let body = post(&format!("{}/runs", self.url), json!({"vector": vector})).await;
        body["base_url"].as_str().unwrap().to_owned()
    }

    /// What the server saw that it should not have.
    pub async fn verdict(&self, base_url: &str) -> Vec<String> {
        let body = post(&format!("{base_url}/verdict"), json!({})).await;
        serde_json::from_value(body["faults"].clone()).unwrap()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// The answer's JSON.
async fn post(url: &str, body: Value) -> Value {
    static HTTP: OnceLock<reqwest::Client> = OnceLock::new();
    let http = HTTP.get_or_init(|| reqwest::Client::builder().no_proxy().build().unwrap());
    let answer = http.post(url).body(body.to_string()).send().await.unwrap();
    serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
}
