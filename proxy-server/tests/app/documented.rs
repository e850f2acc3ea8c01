//! The YAML blocks of README.md and docs/: what is a configuration of ours is one, and nothing in them is unknown to us.

use std::path::{Path, PathBuf};
use std::process::Command;

use edge_agent::config::Overrides;

/// A block with the document it stands in and its line.
struct Block {
    place: String,
    text: String,
}

/// Whose configuration a block is.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// The whole file or some of its keys.
    Server,
    Agent,
    /// An object of Kubernetes or of kubeadm; `e2e/tests/kubernetes/documented.rs` has them.
    Object,
    /// The file of k3s.
    K3s,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn documents() -> Vec<PathBuf> {
    let mut documents = vec![root().join("README.md")];
    for folder in ["docs", "docs/adr"] {
        for file in std::fs::read_dir(root().join(folder)).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                documents.push(path);
            }
        }
    }
    documents
}

/// The blocks of a document, without the indentation that a list gives them.
fn blocks(document: &Path) -> Vec<Block> {
    let text = std::fs::read_to_string(document).unwrap();
    let mut lines = text.lines().enumerate();
    let mut blocks = Vec::new();
    while let Some((number, line)) = lines.next() {
        if line.trim() != "```yaml" {
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let body = lines.by_ref().map(|(_, line)| line);
        let body = body.take_while(|line| line.trim() != "```");
        let body: Vec<&str> = body.map(|line| line.get(indent..).unwrap_or("")).collect();
        blocks.push(Block {
            place: format!("{}:{}", document.display(), number + 1),
            text: body.join("\n") + "\n",
        });
    }
    blocks
}

impl Block {
    fn kind(&self) -> Kind {
        let has = |key: &str| {
            let mut lines = self.text.lines();
            lines.any(|line| line.starts_with(key))
        };
        if has("apiVersion:") {
            Kind::Object
        } else if has("kube-apiserver-arg:") {
            Kind::K3s
        } else if ["servers:", "join:", "nodeAddresses:", "localhostPorts:"]
            .into_iter()
            .any(has)
            || has("allow:")
        {
            Kind::Agent
        } else {
            Kind::Server
        }
    }

    /// As the file of a proxy-server: a list is one of frontends.
    fn server(&self) -> String {
        if self.text.starts_with("- ") {
            return format!("frontends:\n{}", self.text);
        }
        self.text.clone()
    }

    /// As the file of an edge-agent.
    fn agent(&self) -> String {
        let mut text = self.text.clone();
        for (key, value) in [("name:", "edge1"), ("servers:", "['proxy-server:8443']")] {
            if !text.lines().any(|line| line.starts_with(key)) {
                text.push_str(&format!("{key} {value}\n"));
            }
        }
        text
    }
}

fn all() -> Vec<Block> {
    documents().iter().flat_map(|d| blocks(d)).collect()
}

#[test]
fn documented_configurations_are_configurations() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("proxy-server.yaml");
    let mut servers = 0;
    for block in all() {
        match block.kind() {
            Kind::Server => {
                servers += 1;
                std::fs::write(&file, block.server()).unwrap();
                let checked = Command::new(env!("CARGO_BIN_EXE_proxy-server"))
                    .args(["check-config", "--name", "proxy-1", "--config"])
                    .arg(&file)
                    .output()
                    .unwrap();
                let said = String::from_utf8_lossy(&checked.stdout);
                let errors = String::from_utf8_lossy(&checked.stderr);
                assert!(checked.status.success(), "{}: {errors}", block.place);
                assert!(!said.contains("warning"), "{}: {said}", block.place);
            }
            Kind::Agent => {
                let path = Path::new("edge-agent.yaml");
                let read = edge_agent::config::parse(path, &block.agent(), &Overrides::default());
                read.unwrap_or_else(|error| {
                    panic!("{}: {}", block.place, daemon::chain(&error));
                });
            }
            Kind::Object | Kind::K3s => {}
        }
    }
    assert!(servers >= 4, "the documents have {servers} blocks of ours");
}

#[test]
fn egress_selectors_name_sockets_that_are_documented() {
    let blocks = all();
    let sockets = |block: &Block, key: &str| -> Vec<String> {
        let parts = block.text.split(key).skip(1);
        let end = |c: char| c.is_whitespace() || "},'".contains(c);
        parts
            .filter_map(|part| part.split(end).next().map(str::to_owned))
            .collect()
    };
    let (mut named, mut listened) = (0, vec!["/run/corvid/connect.sock".to_owned()]);
    for block in &blocks {
        listened.extend(sockets(block, "unix:"));
    }
    for block in &blocks {
        for socket in sockets(block, "udsName: ") {
            named += 1;
            assert!(
                listened.contains(&socket),
                "{}: nobody listens on {socket}",
                block.place
            );
        }
    }
    assert!(named >= 3, "{named} sockets are named");
}
