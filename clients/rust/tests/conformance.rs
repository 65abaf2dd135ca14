//! Every vector of `clients/conformance`, against the scripted gateway, or a real one at `TIDEWRIGHT_URL`.

#[path = "support/play.rs"]
mod play;
mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use support::{conformance, Scripted};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// So many vectors at a time: most of them wait. Those with much text run alone: the scripted gateway has one thread,
/// and would be late with all others.
const AT_A_TIME: usize = 4;

/// All vectors, sorted by file.
fn vectors() -> Vec<Value> {
    let folder = conformance().join("vectors");
    let entries = std::fs::read_dir(&folder).expect("clients/conformance/vectors beside this crate");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let lists = files.iter().map(|file| {
        let text = std::fs::read_to_string(file).unwrap();
        let list: Vec<Value> = serde_json::from_str(&text).unwrap();
        list
    });
    lists.flatten().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vectors_of_the_scripted_gateway() {
    let scripted = Arc::new(Scripted::start());
    let (played, left_out): (Vec<_>, Vec<_>) = vectors().into_iter().partition(|one| one.get("server").is_some());
    for vector in &left_out {
        println!("left out: {}, which runs against a real gateway", vector["name"].as_str().unwrap());
    }
    let count = played.len();
    assert!(count > 50, "only {count} vectors");
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut runs = JoinSet::new();
    for vector in played {
        let (scripted, places) = (scripted.clone(), places.clone());
        let server = vector["server"].to_string();
        let is_big = server.contains("\"flood\"") || server.contains("\"big\"");
        runs.spawn(async move {
            let _places = places.acquire_many_owned(if is_big { AT_A_TIME } else { 1 } as u32).await.unwrap();
            run(&vector, &scripted).await
        });
    }
    let mut faults = Vec::new();
    while let Some(done) = runs.join_next().await {
        faults.extend(done.unwrap());
    }
    println!("{count} vectors played");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Connections are reused on a runtime of one thread too, where their tasks run only between those of the caller.
#[tokio::test]
async fn connections_on_one_thread() {
    let scripted = Scripted::start();
    let mut faults = Vec::new();
    for vector in vectors().iter().filter(|vector| vector["verdict"].get("connections").is_some()) {
        for _ in 0..10 {
            faults.extend(run(vector, &scripted).await);
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

async fn run(vector: &Value, scripted: &Scripted) -> Vec<String> {
    let name = vector["name"].as_str().unwrap();
    let base_url = scripted.run(name).await;
    let client = play::client(vector, &base_url, None);
    let outcome = play::play(vector, &client, "scripted").await;
    let mut faults = play::faults(vector, &outcome);
    faults.extend(scripted.verdict(&base_url).await);
    faults.iter().map(|fault| format!("{name}: {fault}")).collect()
}

#[tokio::test]
async fn vectors_of_a_real_gateway() {
    let Ok(url) = std::env::var("TIDEWRIGHT_URL") else {
        println!("left out: TIDEWRIGHT_URL names no gateway");
        return;
    };
    let key = std::env::var("TIDEWRIGHT_KEY").ok();
    let model = std::env::var("TIDEWRIGHT_MODEL").unwrap_or_else(|_| "smollm2-135m".into());
    let mut faults = Vec::new();
    let mut count = 0;
    for vector in vectors().iter().filter(|vector| vector["against"] == "gateway") {
        count += 1;
        let client = play::client(vector, &url, key.as_deref());
        let outcome = play::play(vector, &client, &model).await;
        let mut found = play::faults(vector, &outcome);
        if let Some(checks) = vector["expect"]["checks"].as_object() {
            for (check, value) in checks {
                found.extend(failed(check, value, vector, &outcome, &client, &url, key.as_deref(), &model).await);
            }
        }
        faults.extend(found.iter().map(|fault| format!("{}: {fault}", vector["name"])));
    }
    assert!(count > 5, "only {count} vectors");
    println!("{count} vectors of a real gateway played");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[allow(clippy::too_many_arguments)]
async fn failed(
    check: &str,
    value: &Value,
    vector: &Value,
    outcome: &play::Outcome,
    client: &tidewright_client::Client,
    url: &str,
    key: Option<&str>,
    model: &str,
) -> Option<String> {
    let answer = &outcome.answer;
    let is_met = match check {
        "stream_equals_whole" => {
            let whole = play::play_whole(vector, client, model).await;
            !answer.text.is_empty() && (&whole.text, &whole.finish_reason) == (&answer.text, &answer.finish_reason)
        }
        "usage_adds_up" => answer.usage.as_ref().is_some_and(|usage| {
            let (prompt, completion) = (usage.prompt_tokens, usage.completion_tokens);
            prompt > 0 && completion > 0 && prompt + completion == usage.total_tokens
        }),
        "finish_in" => value.as_array().unwrap().iter().any(|one| one.as_str() == answer.finish_reason.as_deref()),
        "calls" => matches!(answer.tool_calls.as_slice(), [call] if call.name == value.as_str().unwrap()),
        "idle_within" => outcome.is_cancelled && is_idle_within(url, key, value.as_f64().unwrap()).await,
        other => panic!("the vectors check {other}, which this suite does not know"),
    };
    (!is_met).then(|| format!("{check} is not met by {answer:?}"))
}

async fn is_idle_within(url: &str, key: Option<&str>, seconds: f64) -> bool {
    let until = tokio::time::Instant::now() + Duration::from_secs_f64(seconds);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    while tokio::time::Instant::now() < until {
        let request = http.get(format!("{}/metrics", url.trim_end_matches('/'))).bearer_auth(key.unwrap_or_default());
        let metrics = request.send().await.unwrap().error_for_status().unwrap().text().await.unwrap();
        let mut lines = metrics.lines().filter(|line| line.starts_with("tidewright_gateway_replica_in_flight{"));
        let first = lines.next().expect("/metrics counts what is in flight");
        if [first].into_iter().chain(lines).all(|line| line.ends_with(" 0.0")) {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    false
}
