//! Services whose pods are at the edge as destinations: each kind, by name and by address, and for kube-apiserver's own proxy.
//!
//! No controllers run here, so what they would write is written by hand: the slices, as the endpoint controller makes them.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, NODES, pods, until};
use serde_json::{Value, json};

use crate::reach::{address, alone, by_own_proxy, is_page_of};

/// For what is told by a watch.
const SOON: Duration = Duration::from_secs(30);

/// A Service of a node's pod, and one of both.
pub(super) fn offer(cluster: &Cluster) -> Result<()> {
    let ports = json!([{"name": "http", "port": 80, "targetPort": pods::WEB_PORT}]);
    let mut all = Vec::new();
    for node in NODES {
        let name = service_name(node);
        all.push(service(&name, &json!({"type": "NodePort", "ports": ports})));
        all.push(slice(cluster, &name, &name, &pods::name(node))?);
        all.push(slice(
            cluster,
            &format!("both-{node}"),
            "both",
            &pods::name(node),
        )?);
    }
    all.push(service(
        "both",
        &json!({"clusterIP": "None", "ports": ports}),
    ));
    let other = format!("{}.default.svc.cluster.local", service_name("edge1"));
    all.push(service(
        "page",
        &json!({"type": "ExternalName", "externalName": other}),
    ));
    for object in &all {
        apply(cluster, object)?;
    }
    Ok(())
}

fn service_name(node: &str) -> String {
    format!("web-of-{node}")
}

fn service(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": spec})
}

/// A slice with one endpoint, that pod.
fn slice(cluster: &Cluster, name: &str, of: &str, pod: &str) -> Result<Value> {
    Ok(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": of}},
        "ports": [{"name": "http", "port": pods::WEB_PORT, "protocol": "TCP"}],
        "endpoints": [{
            "addresses": [address(cluster, pod)?], "conditions": {"ready": true}, "hostname": pod,
            "targetRef": {"kind": "Pod", "namespace": "default", "name": pod},
        }],
    }))
}

fn apply(cluster: &Cluster, object: &Value) -> Result<()> {
    let file = cluster.dir().join("service.json");
    fs::write(&file, object.to_string())?;
    let file = file.display().to_string();
    cluster.kubectl().ok(&["apply", "-f", &file])?;
    Ok(())
}

fn field(cluster: &Cluster, service: &str, path: &str) -> Result<String> {
    let path = format!("jsonpath={{{path}}}");
    let get = ["get", "service", service, "-o", &path];
    Ok(String::from_utf8(cluster.kubectl().ok(&get)?)?)
}

/// Fetches the page of a node's pod by the name of its Service.
pub(super) fn by_name(cluster: &Cluster, node: &str) -> Result<()> {
    is_reached(
        cluster,
        node,
        &format!("{}.default.svc:80", service_name(node)),
    )
}

/// By CONNECT where kube-apiserver asks, by CONNECT of the forward proxy, and by a plain request to that.
fn is_reached(cluster: &Cluster, node: &str, to: &str) -> Result<()> {
    let (frontend, proxy) = (
        cluster.tunnel().connect_door(),
        cluster.tunnel().forward_proxy()?,
    );
    for door in [&frontend, &proxy] {
        let tunnel = door.connect(to)?.with_context(|| to.to_owned())?;
        is_page_of(node, tunnel, "/lines").with_context(|| to.to_owned())?;
    }
    is_page_of(node, proxy.knock()?, &format!("http://{to}/lines")).with_context(|| to.to_owned())
}

/// Each way to name a Service leads to its pod.
pub(super) fn by_every_name(cluster: &Cluster) -> Result<String> {
    offer(cluster)?;
    let mut said = Vec::new();
    for node in NODES {
        until(SOON, "the Service is known", || by_name(cluster, node))?;
        let name = service_name(node);
        let ip = field(cluster, &name, ".spec.clusterIP")?;
        let port = field(cluster, &name, ".spec.ports[0].nodePort")?;
        // Both nodes have one address, so the port is asked for at a node's name: at either node's.
        for to in [
            format!("{name}.default.svc.cluster.local.:80"),
            format!("{ip}:80"),
            format!("edge1:{port}"),
            format!("edge2:{port}"),
        ] {
            is_reached(cluster, node, &to)?;
            said.push(to);
        }
    }
    is_reached(cluster, "edge1", "page.default.svc:80")?;
    Ok(said.join(", "))
}

/// The pods of both nodes have one address: each is reached by its own name within the Service.
pub(super) fn twins(cluster: &Cluster) -> Result<String> {
    offer(cluster)?;
    let [one, two] = NODES.map(|node| address(cluster, &pods::name(node)));
    let (one, two) = (one?, two?);
    ensure!(one == two, "{one} and {two}: nothing to mix up");
    for node in NODES {
        let to = format!("{}.both.default.svc:{}", pods::name(node), pods::WEB_PORT);
        until(SOON, "the Service is known", || {
            is_reached(cluster, node, &to)
        })?;
    }
    Ok(format!("both at {one}"))
}

/// A port that it does not have is refused in words; so is a Service without an endpoint that is ready.
pub(super) fn refused(cluster: &Cluster) -> Result<String> {
    offer(cluster)?;
    let name = service_name("edge1");
    until(SOON, "the Service is known", || by_name(cluster, "edge1"))?;
    let told = |to: &str| -> Result<String> {
        let answer = cluster.tunnel().forward_proxy()?.connect(to)?;
        Ok(answer.err().context("it was dialled")?.to_string())
    };
    let port = told(&format!("{name}.default.svc:81"))?;
    let wanted = format!("service default/{name} has no TCP port 81 (ports: 80)");
    ensure!(port.contains(&wanted), "{port}");
    let mut idle = slice(cluster, &name, &name, &pods::name("edge1"))?;
    *idle
        .pointer_mut("/endpoints/0/conditions/ready")
        .context("no endpoint")? = json!(false);
    apply(cluster, &idle)?;
    let wanted = format!("service default/{name} has no ready endpoint");
    let idle = until(SOON, "it has none", || {
        let said = told(&format!("{name}.default.svc:80"))?;
        ensure!(said.contains(&wanted), "{said}");
        Ok(said)
    })?;
    offer(cluster)?;
    until(SOON, "it is ready again", || by_name(cluster, "edge1"))?;
    Ok(format!("{port}; {idle}"))
}

/// kube-apiserver's own proxy of Services looks up an endpoint and dials that, a pod's address that nobody else has.
pub(super) fn service_proxy(cluster: &Cluster) -> Result<String> {
    let (pod, ip) = alone(cluster)?;
    let ports = json!([{"name": "http", "port": 80, "targetPort": pods::WEB_PORT}]);
    apply(cluster, &service("alone", &json!({"ports": ports})))?;
    apply(cluster, &slice(cluster, "alone", "alone", &pod)?)?;
    // Where kube-apiserver still looks for endpoints.
    let metadata = json!({"name": "alone", "namespace": "default", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}});
    // Only what is a pod is dialled.
    let target = json!({"kind": "Pod", "namespace": "default", "name": pod});
    let subset = json!({"addresses": [{"ip": ip, "targetRef": target}], "ports": [{"name": "http", "port": pods::WEB_PORT}]});
    apply(
        cluster,
        &json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": metadata, "subsets": [subset]}),
    )?;
    by_own_proxy(cluster, "services/alone:http")?;
    Ok(format!("{pod} at {ip}"))
}
