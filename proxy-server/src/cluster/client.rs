//! Where kube-apiserver is and who we are to it: a kubeconfig or the pod's service account.
//!
//! Read at start, where a mistake ends the start, and again whenever all nodes are read anew, so that a renewed
//! credential is used. Proxies of the kubeconfig or the environment are not used: one of them might be ourselves.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::TryFutureExt as _;
use futures_util::future::MapOk;
use http::{Request, Response};
use http_body_util::Limited;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Client, ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tower::timeout::TimeoutLayer;
use tower::{Service, ServiceBuilder};

use super::Cluster;
use super::pace::is_watch;
use crate::config::{Kubernetes, NAMESPACE};

/// For a TCP connect.
const CONNECT: Duration = Duration::from_secs(5);
/// For the head of an answer, connect and TLS included; kube-apiserver sends that of a watch at once. Its own limit for
/// a list is 60 s, of which a page of 500 nodes needs a small part.
const ANSWER: Duration = Duration::from_secs(30);
/// Largest answer about a single object: a ConfigMap or Secret has 1 MiB, and its managed fields.
const MOST: usize = 4 << 20;
/// Largest page of a list: what [`PAGE`] objects have, each as large as etcd takes one (1.5 MiB).
const MOST_LISTED: usize = 96 << 20;
/// Objects a page. Anybody may make his as large as etcd takes them, and a page is read whole.
pub(super) const PAGE: u32 = 50;
/// A peer that has vanished is noticed, while the watch is silent.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("read the kubeconfig")]
    Kubeconfig(#[source] kube::config::KubeconfigError),
    #[error("use the service account of this pod")]
    InCluster(#[source] kube::config::InClusterError),
    #[error("build the client of kube-apiserver")]
    Build(#[source] kube::Error),
    #[error("kube-apiserver's address {0} is a listener of this very server")]
    Ourselves(SocketAddr),
}

/// Where a client comes from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Kubeconfig(PathBuf),
    InCluster,
}

impl Source {
    pub(crate) fn new(kubernetes: &Kubernetes) -> Self {
        kubernetes
            .kubeconfig
            .clone()
            .map_or(Self::InCluster, Self::Kubeconfig)
    }

    /// Reads what can be read without kube-apiserver; what is wrong with it is a mistake of the operator.
    pub(crate) fn check(&self, own: &[SocketAddr]) -> Result<(), ClientError> {
        let url = match self {
            Self::Kubeconfig(file) => {
                let read = Kubeconfig::read_from(file).map_err(ClientError::Kubeconfig)?;
                let cluster = context(&read)
                    .and_then(|c| read.clusters.iter().find(|named| named.name == c.cluster));
                cluster.and_then(|c| c.cluster.as_ref()?.server.clone())
            }
            Self::InCluster => {
                let config = kube::Config::incluster().map_err(ClientError::InCluster)?;
                Some(config.cluster_url.to_string())
            }
        };
        let uri = url.and_then(|url| url.parse::<http::Uri>().ok());
        let host = uri.as_ref().and_then(http::Uri::host).unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = uri.as_ref().and_then(http::Uri::port_u16).unwrap_or(443);
        if let Ok(ip) = host.parse() {
            let address = SocketAddr::new(ip, port);
            if crate::path::direct::is_own(address, own) {
                return Err(ClientError::Ourselves(address));
            }
        }
        Ok(())
    }

    /// Where our own objects are.
    pub(crate) fn namespace_for(&self, settings: &Kubernetes) -> String {
        let said = settings.namespace.clone().or_else(|| self.namespace());
        said.unwrap_or_else(|| NAMESPACE.to_owned())
    }

    /// The namespace that is said beside the credential.
    fn namespace(&self) -> Option<String> {
        match self {
            Self::Kubeconfig(file) => context(&Kubeconfig::read_from(file).ok()?)?
                .namespace
                .clone(),
            Self::InCluster => Some(kube::Config::incluster().ok()?.default_namespace),
        }
    }

    /// A client; each good answer is noted in `cluster`.
    pub(super) async fn connect(&self, cluster: &Arc<Cluster>) -> Result<Client, ClientError> {
        let cluster = Arc::clone(cluster);
        self.build(move || cluster.answered(), usize::MAX).await
    }

    /// A client for single objects, whose answers say nothing of how current the nodes are.
    pub(super) async fn connect_apart(&self) -> Result<Client, ClientError> {
        self.build(|| {}, MOST).await
    }

    /// A client that lists and watches.
    pub(super) async fn connect_following(&self) -> Result<Client, ClientError> {
        self.build(|| {}, MOST_LISTED).await
    }

    /// `most` is the largest answer; a watch may last as long as it likes, and each of its lines is one object.
    async fn build(
        &self,
        answered: impl Fn() + Clone + Send + 'static,
        most: usize,
    ) -> Result<Client, ClientError> {
        let config = match self {
            Self::Kubeconfig(file) => {
                let read = Kubeconfig::read_from(file).map_err(ClientError::Kubeconfig)?;
                let options = KubeConfigOptions::default();
                kube::Config::from_custom_kubeconfig(read, &options)
                    .await
                    .map_err(ClientError::Kubeconfig)?
            }
            Self::InCluster => kube::Config::incluster().map_err(ClientError::InCluster)?,
        };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_keepalive(Some(KEEPALIVE));
        let connector = config
            .rustls_https_connector_with_connector(tcp)
            .map_err(ClientError::Build)?;
        let note = move |response: Response<Limited<hyper::body::Incoming>>| {
            if response.status().is_success() {
                answered();
            }
            response
        };
        // kube's own stack logs each refused connection as an error of its own.
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer().map_err(ClientError::Build)?)
            .layer(TimeoutLayer::new(ANSWER))
            .map_response(note)
            .layer_fn(|inner| Capped { inner, most })
            .service(HttpClient::builder(TokioExecutor::new()).build(connector));
        Ok(ClientBuilder::new(service, config.default_namespace).build())
    }
}

/// Bounds answers.
#[derive(Debug, Clone)]
struct Capped<S> {
    inner: S,
    most: usize,
}

impl<S, B, O> Service<Request<B>> for Capped<S>
where
    S: Service<Request<B>, Response = Response<O>>,
{
    type Response = Response<Limited<O>>;
    type Error = S::Error;
    type Future = MapOk<S::Future, Box<dyn FnOnce(Response<O>) -> Self::Response + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let most = if is_watch(&request) {
            usize::MAX
        } else {
            self.most
        };
        let answer = self.inner.call(request);
        answer.map_ok(Box::new(move |response| {
            response.map(|body| Limited::new(body, most))
        }))
    }
}

/// The context that a kubeconfig says is current.
fn context(read: &Kubeconfig) -> Option<&kube::config::Context> {
    let current = read.current_context.as_ref()?;
    let context = read.contexts.iter().find(|c| c.name == *current)?;
    context.context.as_ref()
}
