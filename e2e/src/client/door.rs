//! A frontend of the proxy-server, seen from outside.

use std::fs::File;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::{Io, Refusal, Tunnel};
use crate::kubelet::Behaviour;
use crate::net::Host;

/// Longest silence on a stream before a read fails: a test that hangs says where.
const SILENCE: Duration = Duration::from_secs(60);

/// A frontend of the proxy-server, and how to get in.
#[derive(Debug, Clone)]
pub enum Door {
    /// A Unix socket, which is reached from every network namespace.
    Unix(PathBuf),
    /// TCP with mutual TLS.
    Tls(Box<TlsDoor>),
}

/// What it takes to get in over TCP.
#[derive(Debug, Clone)]
pub struct TlsDoor {
    host: Host,
    addr: SocketAddr,
    config: Arc<ClientConfig>,
}

impl Door {
    /// The door at `addr`, as seen from `host`, for the client certificate that `proxy-server cert issue --client NAME` wrote
    /// into `folder`.
    ///
    /// # Errors
    /// When the files are not there or not in order.
    pub fn tls(host: &Host, addr: SocketAddr, folder: &Path, name: &str) -> Result<Self> {
        let read = |file: String| -> Result<Vec<CertificateDer<'static>>> {
            let path = folder.join(file);
            let pem =
                BufReader::new(File::open(&path).with_context(|| path.display().to_string())?);
            Ok(CertificateDer::pem_reader_iter(pem).collect::<Result<_, _>>()?)
        };
        let mut roots = RootCertStore::empty();
        for root in read("ca.crt".into())? {
            roots.add(root)?;
        }
        let key = PrivateKeyDer::from_pem_file(folder.join(format!("{name}.key")))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(read(format!("{name}.crt"))?, key)?;
        Ok(Self::Tls(Box::new(TlsDoor {
            host: host.clone(),
            addr,
            config: Arc::new(config),
        })))
    }

    /// Connects, without saying anything.
    ///
    /// # Errors
    /// When the door does not open.
    pub fn knock(&self) -> Result<Tunnel> {
        let io = match self {
            Self::Unix(path) => {
                let stream = UnixStream::connect(path)
                    .with_context(|| format!("connecting to {}", path.display()))?;
                stream.set_read_timeout(Some(SILENCE))?;
                Io::Unix(stream)
            }
            Self::Tls(door) => {
                let stream = door.host.enter(|| TcpStream::connect(door.addr))?;
                let stream = stream.with_context(|| format!("connecting to {}", door.addr))?;
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_nodelay(true)?;
                let name = ServerName::IpAddress(door.addr.ip().into());
                let tls = ClientConnection::new(Arc::clone(&door.config), name)?;
                Io::Tls(Box::new(StreamOwned::new(tls, stream)))
            }
        };
        Ok(Tunnel {
            io,
            finished: false,
        })
    }

    /// Asks for a destination.
    ///
    /// # Errors
    /// When the door does not open, or what it answers is not HTTP.
    pub fn connect(&self, destination: &str) -> Result<Result<Tunnel, Refusal>> {
        let mut tunnel = self.knock()?;
        tunnel.ask(destination)?;
        tunnel.answer()
    }

    /// Asks for a destination that must be reached, and tells the stand-in kubelet there what to do.
    ///
    /// # Errors
    /// When the destination is refused (a [`Refusal`]) or the door does not open.
    pub fn open(&self, destination: &str, behaviour: Behaviour) -> Result<Tunnel> {
        let mut tunnel = self.connect(destination)??;
        writeln!(tunnel, "{behaviour}").context("the first line")?;
        Ok(tunnel)
    }

    /// Asks for a destination that must be refused.
    ///
    /// # Errors
    /// When it is reached.
    pub fn refusal(&self, destination: &str) -> Result<Refusal> {
        match self.connect(destination)? {
            Ok(_) => bail!("{destination} was reached"),
            Err(refusal) => Ok(refusal),
        }
    }
}
