//! A real kube-apiserver, two real kubelets behind NAT with one address, and kubectl through the tunnel.
//!
//! Content is compared, never exit codes alone: `kubectl logs -f` ends well on a broken connection. The cluster takes half
//! a minute to start, so it is shared: one test, many steps, all of which run whatever fails before them.
//! `CORVID_STEPS=exec,cp` runs those steps alone whose name begins so.

use anyhow::Result;
use e2e::cluster::{Cluster, NODES, Steps, report};
use parking_lot::Mutex;
use tokio::time::Instant;

mod deployed;
mod documented;
mod enrol;
mod events;
mod exec;
mod faults;
mod forward;
mod intercepted;
mod k3s;
mod known;
mod logs;
mod manifests;
mod metrics;
mod rbac;
mod reach;
mod scrapers;
mod services;
mod upkeep;

/// Two clusters are more than a machine has cores for.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn kubectl_reaches_both_nodes_through_the_tunnel() {
    if !e2e::net::may_run() {
        return;
    }
    let _alone = ALONE.lock();
    let start = Instant::now();
    let mut cluster = Cluster::start().unwrap_or_else(|error| panic!("{error:#}"));
    report(&format!(
        "\n  the cluster stands after {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    let mut steps = Steps::default();
    let open = upkeep::Open::count(&cluster).unwrap();
    steps.run("every_overlay_of_deploy_is_accepted", || {
        manifests::accepted(&cluster)
    });
    over_a_unix_socket(&mut steps, &mut cluster);
    steps.run("apiserver_gone_leaves_nothing_open", || {
        open.compare(&mut cluster)
    });
    past_kube_apiserver(&mut steps, &mut cluster);
    what_the_cluster_knows(&mut steps, &mut cluster);
    over_mutual_tls(&mut steps, &mut cluster);
    over_konnectivity(&mut steps, &mut cluster);
    steps.run("grpc_apiserver_gone_leaves_nothing_open", || {
        open.compare(&mut cluster)
    });
    by_dns(&mut steps, &mut cluster);
    by_redirect(&mut steps, &mut cluster);
    steps.run("daemons_complain_of_nothing", || {
        upkeep::no_complaints(&cluster)
    });
    steps.finish();
}

/// Everything that a user may ask of a node.
fn over_a_unix_socket(steps: &mut Steps, cluster: &mut Cluster) {
    let followed = NODES.map(|node| logs::Followed::start(cluster, node));
    steps.run("long_logs_arrive_whole", || logs::long_logs(cluster));
    steps.run("sessions_come_by_quic_from_behind_nat", || {
        upkeep::sessions(cluster)
    });
    steps.run(
        "each_of_two_nodes_with_one_address_answers_for_itself",
        || metrics::each_node_answers_for_itself(cluster),
    );
    steps.run("exec_hands_on_stdin_and_its_end", || exec::stdin(cluster));
    steps.run("exec_tells_exit_codes", || exec::exit_codes(cluster));
    steps.run("exec_has_a_terminal_that_follows_its_size", || {
        exec::terminal(cluster)
    });
    steps.run("exec_carries_100_mb_each_way_through_cat", || {
        exec::cat(cluster)
    });
    steps.run("attach_hears_and_speaks", || exec::attach(cluster));
    steps.run("port_forward_carries_100_connections", || {
        forward::connections(cluster, 100)
    });
    steps.run("cp_copies_both_ways", || forward::copy(cluster));
    steps.run("cadvisor_metrics_arrive", || metrics::cadvisor(cluster));
    steps.run("twenty_scrapes_at_once_arrive", || {
        metrics::twenty_at_once(cluster)
    });
    steps.run("a_stopped_reader_delays_nobody", || {
        faults::stopped_reader(cluster)
    });
    steps.run("an_unknown_node_is_named_in_the_error", || {
        faults::unknown_node(cluster)
    });
    steps.run(
        "followed_logs_miss_no_line_in_a_minute",
        || -> Result<String> {
            let mut notes = Vec::new();
            for followed in followed {
                notes.push(followed?.finish(cluster)?);
            }
            Ok(notes.join(", "))
        },
    );
    steps.run("a_killed_agent_ends_what_ran_and_is_named", || {
        faults::killed_agent(cluster)
    });
}

/// What asks the edge without kube-apiserver; and what kube-apiserver asks in the cloud, by the same egress.
fn past_kube_apiserver(steps: &mut Steps, cluster: &mut Cluster) {
    let started = steps.run("direct_apiserver_starts_again", || {
        let egress = cluster.tunnel().with_direct();
        cluster.start_apiserver(&egress)?;
        Ok("with an egress that dials what is in the cloud")
    });
    if !started {
        return; // nothing to ask
    }
    steps.run("prometheus_finds_and_scrapes_both_nodes", || {
        scrapers::prometheus(cluster)
    });
    steps.run("kubectl_top_shows_nodes_and_pods_of_the_edge", || {
        scrapers::top(cluster, &cluster.metrics_server()?)
    });
}

/// The proxy-server as a client of kube-apiserver, and each without the other.
fn what_the_cluster_knows(steps: &mut Steps, cluster: &mut Cluster) {
    steps.run("nodes_are_known_to_a_pods_service_account", || {
        known::nodes(cluster)
    });
    steps.run("enrolling_pods_run", || enrol::pods(cluster));
    steps.run("enrolment_asks_whose_token_it_is", || {
        enrol::each_token(cluster)
    });
    steps.run("pods_with_one_address_are_told_apart_by_name", || {
        reach::twins(cluster)
    });
    steps.run(
        "pods_are_not_dialled_at_ports_that_they_do_not_declare",
        || reach::undeclared(cluster),
    );
    steps.run("pods_are_reached_by_kube_apiservers_own_proxy", || {
        reach::pod_proxy(cluster)
    });
    steps.run("services_are_reached_by_name_and_by_address", || {
        services::by_every_name(cluster)
    });
    steps.run("services_with_one_pod_address_are_told_apart", || {
        services::twins(cluster)
    });
    steps.run("services_refuse_what_they_do_not_have", || {
        services::refused(cluster)
    });
    steps.run("services_are_reached_by_kube_apiservers_own_proxy", || {
        services::service_proxy(cluster)
    });
    rbac::each_verb(steps, cluster);
    steps.run("enrolment_ends_with_the_pod", || {
        enrol::deleted_pod(cluster)
    });
    steps.run("own_dials_never_come_back_to_us", || {
        known::own_dials(cluster)
    });
    let mut site = None;
    steps.run("nodes_without_an_agent_of_their_name_are_routed", || {
        site = Some(known::Site::start(cluster)?);
        Ok("by name, alias and address, through one agent")
    });
    let Some(site) = site else { return };
    steps.run("nodes_that_are_deleted_leave_no_route", || {
        site.deleted_node(cluster)
    });
    steps.run("nodes_stay_while_kube_apiserver_is_away", || {
        site.apiserver_away(cluster)
    });
    steps.run("nodes_come_back_when_both_are_restarted", || {
        site.both_restarted(cluster)
    });
}

/// The same kube-apiserver with the other transport: what could differ, in short.
fn over_mutual_tls(steps: &mut Steps, cluster: &mut Cluster) {
    let started = steps.run("mtls_apiserver_starts_again", || {
        let egress = cluster.tunnel().mutual_tls()?;
        cluster.start_apiserver(&egress)?;
        Ok("with a client certificate of the tunnel's CA")
    });
    if !started {
        return; // the rest would go over the socket again
    }
    steps.run("mtls_long_logs_arrive_whole", || logs::long_logs(cluster));
    steps.run("mtls_exec_hands_on_stdin_and_its_end", || {
        exec::stdin(cluster)
    });
    steps.run("mtls_exec_tells_exit_codes", || exec::exit_codes(cluster));
    steps.run("mtls_port_forward_carries_10_connections", || {
        forward::connections(cluster, 10)
    });
    steps.run("mtls_twenty_scrapes_at_once_arrive", || {
        metrics::twenty_at_once(cluster)
    });
    steps.run("mtls_an_unknown_node_is_named_in_the_error", || {
        faults::unknown_node(cluster)
    });
}

/// The same kube-apiserver with konnectivity's gRPC, at an absolute socket path.
fn over_konnectivity(steps: &mut Steps, cluster: &mut Cluster) {
    let started = steps.run("grpc_apiserver_starts_again", || {
        let egress = cluster.tunnel().konnectivity();
        cluster.start_apiserver(&egress)?;
        Ok("with proxyProtocol: GRPC")
    });
    if !started {
        return;
    }
    steps.run("grpc_long_logs_arrive_whole", || logs::long_logs(cluster));
    steps.run("grpc_exec_hands_on_stdin_and_its_end", || {
        exec::stdin(cluster)
    });
    steps.run("grpc_exec_tells_exit_codes", || exec::exit_codes(cluster));
    steps.run("grpc_attach_hears_and_speaks", || exec::attach(cluster));
    steps.run("grpc_cp_copies_both_ways", || forward::copy(cluster));
    steps.run("grpc_port_forward_carries_10_connections", || {
        forward::connections(cluster, 10)
    });
    steps.run("grpc_twenty_scrapes_at_once_arrive", || {
        metrics::twenty_at_once(cluster)
    });
    steps.run("grpc_an_unknown_node_is_named_in_the_error", || {
        faults::unknown_node(cluster)
    });
    steps.run("grpc_a_stopped_reader_delays_nobody", || {
        faults::stopped_reader_of_konnectivity(cluster)
    });
}

/// No egress selector, names first: the map for CoreDNS leads kube-apiserver to us, and the name in its TLS tells who is meant.
fn by_dns(steps: &mut Steps, cluster: &mut Cluster) {
    let mut dns = None;
    steps.run("dns_apiserver_starts_again", || {
        let (coredns, told) = intercepted::names(cluster)?;
        dns = Some(coredns);
        Ok(told)
    });
    let Some(dns) = dns else { return };
    steps.run("dns_names_follow_nodes", || {
        intercepted::names_follow_nodes(cluster, &dns)
    });
    matrix("dns", steps, cluster);
}

/// No egress selector, addresses: rules of the kernel lead kube-apiserver to us.
fn by_redirect(steps: &mut Steps, cluster: &mut Cluster) {
    steps.run("redirect_leaves_out_a_shared_address", || {
        intercepted::shared_address(cluster)
    });
    let started = steps.run("redirect_apiserver_starts_again", || {
        intercepted::addresses(cluster)
    });
    if !started {
        return;
    }
    matrix("redirect", steps, cluster);
    steps.run("redirect_gone_leads_nowhere", || {
        intercepted::without_rules(cluster)
    });
}

/// What users ask of nodes, by one more way: what could differ, in short.
fn matrix<T: Sync>(way: &str, steps: &mut Steps, cluster: &Cluster<T>) {
    let step = |name: &str| format!("{way}_{name}");
    steps.run(&step("each_node_answers_for_itself"), || {
        metrics::each_node_answers_for_itself(cluster)
    });
    steps.run(&step("long_logs_arrive_whole"), || logs::long_logs(cluster));
    steps.run(&step("exec_hands_on_stdin_and_its_end"), || {
        exec::stdin(cluster)
    });
    steps.run(&step("exec_tells_exit_codes"), || exec::exit_codes(cluster));
    steps.run(&step("attach_hears_and_speaks"), || exec::attach(cluster));
    steps.run(&step("cp_copies_both_ways"), || forward::copy(cluster));
    steps.run(&step("port_forward_carries_10_connections"), || {
        forward::connections(cluster, 10)
    });
    steps.run(&step("twenty_scrapes_at_once_arrive"), || {
        metrics::twenty_at_once(cluster)
    });
}
