//! Both endpoints over real sockets.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::client::ClientError;
use super::*;
use crate::{Drained, LogHandle, Readiness};

const LOOPBACK: &str = "127.0.0.1:0";

struct Served {
    addr: Listen,
    tasks: Tasks,
}

impl Served {
    fn new(endpoint: Endpoint, routes: Routes) -> Self {
        let addr = endpoint.bound().clone();
        let tasks = Tasks::new();
        let owner = tasks.clone();
        tasks.critical("admin", async move {
            endpoint.serve(routes, &owner).await.unwrap();
        });
        Self { addr, tasks }
    }

    fn observe(readiness: &Readiness, watched: &[Tasks]) -> Self {
        let metrics = Metrics::new("1.2.3");
        let endpoint = Endpoint::observe(&LOOPBACK.parse().unwrap(), &metrics, false).unwrap();
        Self::new(
            endpoint,
            Routes::observe(readiness.clone(), watched, metrics),
        )
    }

    fn admin(routes: Routes) -> Self {
        let listen = LOOPBACK.parse().unwrap();
        Self::new(
            Endpoint::admin(&listen, &Metrics::new("0"), false).unwrap(),
            routes,
        )
    }

    async fn get(&self, path: &str) -> Result<String, (StatusCode, String)> {
        text(client::get(&self.addr, path).await)
    }

    async fn put(&self, path: &str, body: Vec<u8>) -> Result<String, (StatusCode, String)> {
        text(client::put(&self.addr, path, body.into()).await)
    }

    /// Sends raw bytes and returns all that comes back until the end.
    async fn raw(&self, request: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // An endpoint that refuses what it has not read resets the connection after its answer.
        stream.read_to_end(&mut answer).await.ok();
        String::from_utf8(answer).unwrap()
    }

    async fn connect(&self) -> TcpStream {
        #[expect(clippy::disallowed_methods, reason = "a client of the test")]
        TcpStream::connect(self.addr.tcp().unwrap()).await.unwrap()
    }
}

fn text(answer: Result<Bytes, ClientError>) -> Result<String, (StatusCode, String)> {
    match answer {
        Ok(body) => Ok(String::from_utf8_lossy(&body).into_owned()),
        Err(ClientError::Status { status, body, .. }) => Err((status, body)),
        Err(error) => panic!("{}", crate::chain(&error)),
    }
}

#[tokio::test]
async fn readyz_lists_what_is_missing() {
    let readiness = Readiness::new();
    let guards = [readiness.register("routes"), readiness.register("backend")];
    let served = Served::observe(&readiness, &[]);
    let missing = "not ready: backend\nnot ready: routes".to_owned();
    assert_eq!(
        served.get("/readyz").await,
        Err((StatusCode::SERVICE_UNAVAILABLE, missing))
    );
    drop(guards);
    assert_eq!(served.get("/readyz").await, Ok("ok\n".to_owned()));
    readiness.begin_drain();
    let draining = "not ready: draining".to_owned();
    assert_eq!(
        served.get("/readyz").await,
        Err((StatusCode::SERVICE_UNAVAILABLE, draining.clone()))
    );
    for (query, answer) in [
        ("exclude=draining", Ok("ok\n".to_owned())),
        ("verbose&exclude=x&exclude=draining", Ok("ok\n".to_owned())),
        (
            "exclude=drain",
            Err((StatusCode::SERVICE_UNAVAILABLE, draining.clone())),
        ),
        (
            "draining",
            Err((StatusCode::SERVICE_UNAVAILABLE, draining.clone())),
        ),
        ("", Err((StatusCode::SERVICE_UNAVAILABLE, draining))),
    ] {
        assert_eq!(
            served.get(&format!("/readyz?{query}")).await,
            answer,
            "{query}"
        );
    }
}

#[tokio::test]
async fn livez_fails_once_a_critical_task_has_ended() {
    let watched = Tasks::new();
    let served = Served::observe(&Readiness::new(), std::slice::from_ref(&watched));
    assert_eq!(served.get("/livez").await, Ok("ok\n".to_owned()));
    watched.critical("backend", async {});
    watched.failed().await;
    let ended = "backend has ended".to_owned();
    assert_eq!(
        served.get("/livez").await,
        Err((StatusCode::SERVICE_UNAVAILABLE, ended))
    );
}

#[tokio::test]
async fn metrics_are_served_as_openmetrics() {
    let served = Served::observe(&Readiness::new(), &[]);
    let answer = served
        .raw("GET /metrics HTTP/1.1\r\nhost: 10.0.0.1\r\nconnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.contains("content-type: application/openmetrics-text"),
        "{answer}"
    );
    assert!(
        answer.contains("corvid_build_info{version=\"1.2.3\"} 1"),
        "{answer}"
    );
}

#[tokio::test]
async fn admin_refuses_to_listen_beyond_loopback() {
    for listen in [
        "0.0.0.0:0",
        "[::]:0",
        "192.0.2.1:9442",
        "[::ffff:192.0.2.1]:9442",
    ] {
        let error =
            Endpoint::admin(&listen.parse().unwrap(), &Metrics::new("0"), false).unwrap_err();
        assert!(
            matches!(error, AdminError::NotLoopback(_)),
            "{listen}: {error}"
        );
        assert!(error.to_string().contains("loopback"), "{error}");
    }
    assert!(is_local(&"[::1]:0".parse().unwrap()) && is_local(&"127.8.8.8:0".parse().unwrap()));
}

#[tokio::test]
async fn the_log_level_is_read_and_changed() {
    let log = LogHandle::detached();
    let served = Served::admin(Routes::admin(log.clone()));
    assert_eq!(served.get("/log-level").await, Ok("info\n".to_owned()));
    let changed = served
        .put("/log-level", b"warn,daemon=debug\n".to_vec())
        .await;
    assert_eq!(changed, Ok("warn,daemon=debug\n".to_owned()));
    assert_eq!(log.current(), "warn,daemon=debug");
    let (status, sentence) = served.put("/log-level", b"=,=".to_vec()).await.unwrap_err();
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(
        sentence.starts_with("log filter `=,=` is not valid"),
        "{sentence}"
    );
    assert_eq!(log.current(), "warn,daemon=debug");
}

#[tokio::test]
async fn routes_of_the_service_are_served_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let listen = Listen::Unix(dir.path().join("admin.sock"));
    let routes = Routes::admin(LogHandle::detached()).get("/sessions", |request| async move {
        Reply::json(&[request.query])
    });
    let served = Served::new(
        Endpoint::admin(&listen, &Metrics::new("0"), false).unwrap(),
        routes,
    );
    assert_eq!(
        served.get("/sessions?agent=edge1").await,
        Ok("[\"agent=edge1\"]".to_owned())
    );
    assert_eq!(
        served.tasks.drain(Duration::from_secs(30)).await,
        Drained::Clean
    );
    let gone = client::get(&listen, "/sessions").await.unwrap_err();
    assert!(matches!(gone, ClientError::Connect { .. }), "{gone}");
}

#[tokio::test]
async fn what_is_not_there_or_not_allowed_is_said() {
    let served = Served::admin(Routes::admin(LogHandle::detached()));
    let (status, sentence) = served.get("/nothing").await.unwrap_err();
    assert_eq!(
        (status, sentence.as_str()),
        (StatusCode::NOT_FOUND, "not found; there is\n/log-level")
    );
    let answer = served
        .raw("DELETE /log-level HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(answer.contains("allow: GET, PUT\r\n"), "{answer}");
}

#[tokio::test]
async fn admin_answers_requests_for_this_machine_only() {
    let served = Served::admin(Routes::admin(LogHandle::detached()));
    for (host, status) in [
        ("host: rebound.example.com\r\n", "403"),
        ("host: 192.0.2.1:9442\r\n", "403"),
        ("", "403"),
        ("host: LOCALHOST:9442\r\n", "200"),
        ("host: [::1]:9442\r\n", "200"),
    ] {
        let answer = served
            .raw(&format!(
                "GET /log-level HTTP/1.1\r\n{host}connection: close\r\n\r\n"
            ))
            .await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{host}: {answer}"
        );
    }
}

#[tokio::test]
async fn oversized_heads_and_bodies_are_refused() {
    let served = Served::admin(Routes::admin(LogHandle::detached()));
    let (status, _) = served
        .put("/log-level", vec![b'a'; MAX_BODY + 1])
        .await
        .unwrap_err();
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    let padding = "a".repeat(MAX_HEAD);
    let request =
        format!("GET /log-level HTTP/1.1\r\nhost: localhost\r\nx-padding: {padding}\r\n\r\n");
    let answer = served.raw(&request).await;
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431 "),
        "{answer}"
    );
}

#[tokio::test]
async fn a_drain_ends_idle_connections() {
    let served = Served::observe(&Readiness::new(), &[]);
    let mut idle = served.connect().await;
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut answer = vec![0; 4096];
    assert!(idle.read(&mut answer).await.unwrap() > 0);
    assert_eq!(
        served.tasks.drain(Duration::from_secs(30)).await,
        Drained::Clean
    );
    assert_eq!(
        idle.read(&mut answer).await.unwrap(),
        0,
        "the endpoint has closed"
    );
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_let_go() {
    let served = Served::observe(&Readiness::new(), &[]);
    let start = tokio::time::Instant::now();
    assert_eq!(served.raw("GET /livez HTT").await, "");
    assert_eq!(start.elapsed().as_secs(), HEAD_TIMEOUT.as_secs());
    assert!(served.tasks.len() <= 1, "only the listener is left");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_takes_too_long_is_given_up() {
    let served = Served::admin(Routes::new().get("/stuck", |_| std::future::pending()));
    let (status, _) = served.get("/stuck").await.unwrap_err();
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}
