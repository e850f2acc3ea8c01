//! Two servers behind one address: a balancer that places each dial.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use certs::test_ca::TestCa;
use daemon::Tasks;
use proto::Reason;
use proto::transport::Session;
use tokio::net::UdpSocket;
use tokio::time::Duration;

use crate::harness::{Server, Settings, eventually, scenario};

/// A UDP load balancer: the flows that begin go to these servers one after the other, and on to the last.
struct Balancer {
    address: SocketAddr,
    flows: Arc<AtomicUsize>,
    tasks: Tasks,
}

impl Balancer {
    async fn before(places: Vec<SocketAddr>) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = front.local_addr().unwrap();
        let flows = Arc::new(AtomicUsize::new(0));
        let (tasks, begun) = (Tasks::new(), Arc::clone(&flows));
        let returns = tasks.clone();
        tasks.spawn("balancer", async move {
            let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut buffer = vec![0; 65_536];
            while let Ok((count, from)) = front.recv_from(&mut buffer).await {
                let back = match backs.entry(from) {
                    Entry::Occupied(back) => Arc::clone(back.get()),
                    Entry::Vacant(vacant) => {
                        let flow = begun.fetch_add(1, Ordering::Relaxed);
                        let place = places.get(flow).or_else(|| places.last()).unwrap();
                        let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                        back.connect(place).await.unwrap();
                        vacant.insert(Arc::clone(&back));
                        let (heard, front) = (Arc::clone(&back), Arc::clone(&front));
                        returns.spawn("return", async move {
                            let mut buffer = vec![0; 65_536];
                            loop {
                                // A closed port at the far end is reported once and is no end.
                                let Ok(count) = heard.recv(&mut buffer).await else {
                                    continue;
                                };
                                let heard = buffer.get(..count).unwrap();
                                front.send_to(heard, from).await.ok();
                            }
                        });
                        back
                    }
                };
                let sent = buffer.get(..count).unwrap();
                back.send(sent).await.ok(); // lost, as on any line
            }
        });
        Self {
            address,
            flows,
            tasks,
        }
    }

    fn flows(&self) -> usize {
        self.flows.load(Ordering::Relaxed)
    }
}

#[test]
fn a_second_server_behind_one_address_is_found_and_found_again() {
    scenario(
        "seek::a_second_server_behind_one_address_is_found_and_found_again",
        async {
            let ca = TestCa::new();
            let mut one = Server::one_of(&ca, "s1", 2).await;
            let mut two = Server::one_of(&ca, "s2", 2).await;
            let (a, b) = (one.address, two.address);
            let balancer = Balancer::before(vec![a, a, a, b, b, a]).await;
            let mut settings = Settings::new(&ca, &[]);
            settings.servers = vec![balancer.address.to_string()];
            let agent = settings.start();
            let first = one.session().await;
            let second = two.session().await;
            assert_eq!(balancer.flows(), 4, "three dials led to the first one");
            agent.has_sessions(2).await;
            assert!(
                !one.has_session(),
                "the others were given up before their hello"
            );

            // It is lost: sought again, past the one that is there.
            first.session.close(Reason::Internal);
            let third = two.session().await;
            let fourth = one.session().await;
            agent.has_sessions(2).await;
            agent.stopped().await;
            drop((first, second, third, fourth));
            one.stop().await;
            two.stop().await;
            balancer.tasks.drain(Duration::ZERO).await;
        },
    );
}

#[test]
fn nothing_is_sought_while_there_is_one_server_and_at_once_when_there_are_two() {
    scenario(
        "seek::nothing_is_sought_while_there_is_one_server_and_at_once_when_there_are_two",
        async {
            let ca = TestCa::new();
            let mut one = Server::one_of(&ca, "s1", 1).await;
            let mut two = Server::one_of(&ca, "s2", 2).await;
            let balancer = Balancer::before(vec![one.address, two.address]).await;
            let mut settings = Settings::new(&ca, &[]);
            settings.servers = vec![balancer.address.to_string()];
            let agent = settings.start();
            let first = one.session().await;
            agent.has_sessions(1).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(balancer.flows(), 1);
            assert!(first.control.servers(2));
            let mut second = two.session().await;
            agent.has_sessions(2).await;
            // It is told to go: there is no other, so it is held until its end.
            second.go_away(Reason::Draining, Duration::ZERO);
            let again = two.session().await;
            assert_eq!(second.told().await.reason, Reason::Replaced);
            agent.stopped().await;
            drop((first, second, again));
            one.stop().await;
            two.stop().await;
            balancer.tasks.drain(Duration::ZERO).await;
        },
    );
}

#[test]
fn a_second_server_that_drops_every_session_is_not_stormed() {
    scenario(
        "seek::a_second_server_that_drops_every_session_is_not_stormed",
        async {
            let ca = TestCa::new();
            let mut one = Server::one_of(&ca, "s1", 2).await;
            let mut two = Server::one_of(&ca, "s2", 2).await;
            let balancer = Balancer::before(vec![one.address, two.address]).await;
            let mut settings = Settings::new(&ca, &[]);
            settings.servers = vec![balancer.address.to_string()];
            let agent = settings.start();
            let first = one.session().await;
            for _ in 0..4 {
                let taken = two.session().await;
                taken.session.close(Reason::Internal);
            }
            // Longer than anything but a long pause.
            tokio::time::sleep(Duration::from_secs(6)).await;
            assert!(!two.has_session(), "the next one comes after 15 s at least");
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop(first);
            one.stop().await;
            two.stop().await;
            balancer.tasks.drain(Duration::ZERO).await;
        },
    );
}

#[test]
fn two_listed_servers_are_enough() {
    scenario("seek::two_listed_servers_are_enough", async {
        let ca = TestCa::new();
        let mut one = Server::one_of(&ca, "s1", 3).await;
        let mut two = Server::one_of(&ca, "s2", 3).await;
        let agent = Settings::new(&ca, &[&one, &two]).start();
        let sessions = (one.session().await, two.session().await);
        agent.has_sessions(2).await;
        eventually("nothing more comes", async || {
            tokio::time::sleep(Duration::from_secs(6)).await;
            if one.has_session() || two.has_session() {
                Err("a session more")
            } else {
                Ok(())
            }
        })
        .await;
        agent.stopped().await;
        drop(sessions);
        one.stop().await;
        two.stop().await;
    });
}

#[test]
fn a_server_reached_over_a_line_as_well_is_still_one() {
    scenario(
        "seek::a_server_reached_over_a_line_as_well_is_still_one",
        async {
            let ca = TestCa::new();
            let mut one = Server::one_of(&ca, "s1", 2).await;
            let mut two = Server::one_of(&ca, "s2", 2).await;
            let balancer = Balancer::before(vec![one.address, two.address]).await;
            let mut settings = Settings::new(&ca, &[]);
            settings.servers = vec![
                format!("express={}", one.address),
                balancer.address.to_string(),
            ];
            let agent = settings.start();
            let sessions = [one.session().await, one.session().await];
            let second = two.session().await;
            agent.has_sessions(3).await;
            assert_eq!(second.hello.line, "", "over the internet");
            agent.stopped().await;
            drop((sessions, second));
            one.stop().await;
            two.stop().await;
            balancer.tasks.drain(Duration::ZERO).await;
        },
    );
}
