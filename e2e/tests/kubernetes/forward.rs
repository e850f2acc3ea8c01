//! `kubectl port-forward` and `kubectl cp`.

use std::any::Any;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::cluster::content::{lines, noise, sha256};
use e2e::cluster::{Cluster, NODES, pods};

/// For one read or write of a forwarded connection, and for a port to be there.
const DEADLINE: Duration = Duration::from_secs(60);
/// What each connection sends and gets back: more than one frame, and no multiple of one.
const LENGTH: usize = 100_003;

/// Forwards two ports of a node's pod; opens many connections, all before the first is used, and compares what each echoes;
/// fetches a page from the other port.
pub(super) fn connections<T>(cluster: &Cluster<T>, count: u64) -> Result<String> {
    let (web, echo) = (
        format!(":{}", pods::WEB_PORT),
        format!(":{}", pods::ECHO_PORT),
    );
    for node in NODES {
        let args = [
            "port-forward",
            &format!("pod/{}", pods::name(node)),
            &web,
            &echo,
        ];
        let kubectl = cluster.kubectl().start(&args)?;
        let port = |port: u16| -> Result<u16> {
            let end = format!(" -> {port}\n");
            let text = kubectl.wait_for(&end, DEADLINE)?;
            let line = text.lines().find(|line| line.ends_with(end.trim_end()));
            let local = line.and_then(|line| line.strip_prefix("Forwarding from 127.0.0.1:"));
            let local = local.and_then(|rest| rest.split(' ').next());
            Ok(local
                .with_context(|| format!("no port in {text:?}"))?
                .parse()?)
        };
        let (web, echo) = (port(pods::WEB_PORT)?, port(pods::ECHO_PORT)?);
        cluster
            .host("cloud")?
            .enter(|| -> Result<()> {
                echoes(echo, count)?;
                page(web, node)
            })?
            .with_context(|| format!("{node}; kubectl says {:?}", kubectl.errors()))?;
    }
    Ok(format!(
        "{count} open at once to each node, {LENGTH} bytes each way, and a page"
    ))
}

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}

fn echoes(port: u16, count: u64) -> Result<()> {
    // A byte is echoed before the next one is opened: the queue of busybox's nc has room for two.
    let open = || -> Result<TcpStream> {
        let mut stream = connect(port)?;
        let mut heard = [0];
        stream
            .write_all(b"x")
            .and_then(|()| stream.read_exact(&mut heard))?;
        ensure!(heard == *b"x", "a wrong byte");
        Ok(stream)
    };
    let open = |number| open().with_context(|| format!("opening connection {number}"));
    let streams = (0..count).map(open).collect::<Result<Vec<_>>>()?;
    let exchange = |number: u64, stream: &TcpStream| -> Result<()> {
        let (mut writer, mut reader) = (stream, stream);
        let sent = noise(1 + 2 * number, LENGTH);
        let mut heard = vec![0; LENGTH];
        thread::scope(|scope| {
            let writer = scope.spawn(|| writer.write_all(&sent));
            reader.read_exact(&mut heard).context("read")?;
            writer.join().map_err(panicked)?.context("write")
        })?;
        ensure!(heard == sent, "what came back is not what was sent");
        Ok(())
    };
    thread::scope(|scope| {
        let threads = (0..).zip(&streams).map(|(number, stream)| {
            scope.spawn(move || {
                exchange(number, stream).with_context(|| format!("connection {number}"))
            })
        });
        let threads = threads.collect::<Vec<_>>();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(panicked)?)
    })
}

/// What joining a thread that panicked comes to; the panic itself has been printed.
pub(super) fn panicked(_: Box<dyn Any + Send>) -> anyhow::Error {
    anyhow!("a thread panicked")
}

fn page(port: u16, node: &str) -> Result<()> {
    let mut stream = connect(port)?;
    stream.write_all(b"GET /lines HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    ensure!(
        head.starts_with("HTTP/1.1 200 ") || head.starts_with("HTTP/1.0 200 "),
        "{head}"
    );
    ensure!(
        body == lines(node, pods::WEB_LINES),
        "a page of {} bytes is not the one",
        body.len()
    );
    Ok(())
}

/// Copies a folder to the pod and back, and compares hashes there and here.
pub(super) fn copy<T>(cluster: &Cluster<T>) -> Result<String> {
    let files = [("empty", 0), ("small", 17), ("large", 20_000_000)];
    for node in NODES {
        let folder = tempfile::tempdir_in(cluster.dir())?;
        let here = folder.path().join("sent");
        fs::create_dir(&here)?;
        for (name, length) in files {
            fs::write(here.join(name), noise(length as u64, length))?;
        }
        let pod = pods::name(node);
        let (from, to) = (here.display().to_string(), format!("{pod}:/tmp/copied"));
        cluster.kubectl().ok(&["cp", &from, &to, "-c", "tools"])?;
        let sums = "cd /tmp/copied && sha256sum *";
        let sums = cluster
            .kubectl()
            .ok(&["exec", &pod, "-c", "tools", "--", "sh", "-c", sums])?;
        let mut wanted = files
            .map(|(name, length)| format!("{}  {name}\n", sha256(&noise(length as u64, length))));
        wanted.sort_by_key(|line| line.rsplit(' ').next().map(str::to_owned));
        let sums = String::from_utf8(sums)?;
        ensure!(sums == wanted.concat(), "{node} has {sums}");

        let back = folder.path().join("back");
        cluster
            .kubectl()
            .ok(&["cp", &to, &back.display().to_string(), "-c", "tools"])?;
        for (name, _) in files {
            let same = fs::read(back.join(name))? == fs::read(here.join(name))?;
            ensure!(same, "{name} came back from {node} changed");
        }
        let remove = ["exec", &pod, "-c", "tools", "--", "rm", "-r", "/tmp/copied"];
        cluster.kubectl().ok(&remove)?;
    }
    Ok("20 MB there and back for each node".to_owned())
}
