//! Services by name and address, slices by Service, each in step with what was told of it.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::service::Service;
use super::slice::Slice;

/// What is told of one kind of objects, one by one.
pub(super) trait Told {
    type Object;

    fn put(&mut self, object: Self::Object);

    fn remove(&mut self, key: &str);
}

/// Services.
#[derive(Debug, Default)]
pub(super) struct ByService {
    all: HashMap<String, Arc<Service>>,
    addresses: HashMap<IpAddr, Vec<Arc<Service>>>,
    balanced: HashMap<IpAddr, Vec<Arc<Service>>>,
    node_ports: HashMap<u16, Vec<Arc<Service>>>,
}

impl ByService {
    pub(super) fn called(&self, key: &str) -> Option<Arc<Service>> {
        self.all.get(key).cloned()
    }

    /// Those whose own address that is.
    pub(super) fn at(&self, ip: IpAddr) -> Vec<Arc<Service>> {
        self.addresses.get(&ip).cloned().unwrap_or_default()
    }

    /// Those whose load balancer has that address.
    pub(super) fn balanced(&self, ip: IpAddr) -> Vec<Arc<Service>> {
        self.balanced.get(&ip).cloned().unwrap_or_default()
    }

    /// Those that have that port on every node.
    pub(super) fn on_nodes(&self, port: u16) -> Vec<Arc<Service>> {
        self.node_ports.get(&port).cloned().unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }
}

impl Told for ByService {
    type Object = Service;

    fn put(&mut self, service: Service) {
        if self
            .all
            .get(&service.key)
            .is_some_and(|known| **known == service)
        {
            return;
        }
        self.remove(&service.key);
        let service = Arc::new(service);
        for ip in service.addresses() {
            enter(&mut self.addresses, *ip, &service);
        }
        for ip in &service.balanced {
            enter(&mut self.balanced, *ip, &service);
        }
        for port in service.ports.iter().filter_map(|port| port.node_port) {
            enter(&mut self.node_ports, port, &service);
        }
        self.all.insert(service.key.clone(), service);
    }

    fn remove(&mut self, key: &str) {
        let Some(gone) = self.all.remove(key) else {
            return;
        };
        for ip in gone.addresses() {
            leave(&mut self.addresses, ip, |service| service.key == key);
        }
        for ip in &gone.balanced {
            leave(&mut self.balanced, ip, |service| service.key == key);
        }
        for port in gone.ports.iter().filter_map(|port| port.node_port) {
            leave(&mut self.node_ports, &port, |service| service.key == key);
        }
    }
}

/// Slices.
#[derive(Debug, Default)]
pub(super) struct BySlice {
    all: HashMap<String, Arc<Slice>>,
    services: HashMap<String, Vec<Arc<Slice>>>,
}

impl BySlice {
    /// Those of that Service.
    pub(super) fn of(&self, service: &str) -> Vec<Arc<Slice>> {
        self.services.get(service).cloned().unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }
}

impl Told for BySlice {
    type Object = Slice;

    fn put(&mut self, slice: Slice) {
        if self
            .all
            .get(&slice.key)
            .is_some_and(|known| **known == slice)
        {
            return;
        }
        self.remove(&slice.key);
        let slice = Arc::new(slice);
        enter(&mut self.services, slice.service.clone(), &slice);
        self.all.insert(slice.key.clone(), slice);
    }

    fn remove(&mut self, key: &str) {
        if let Some(gone) = self.all.remove(key) {
            let is_it = |slice: &Slice| slice.key == key;
            leave(&mut self.services, &gone.service, is_it);
        }
    }
}

fn enter<K: Eq + Hash, V: PartialEq>(by: &mut HashMap<K, Vec<Arc<V>>>, key: K, value: &Arc<V>) {
    let there = by.entry(key).or_default();
    // A Service may say one thing twice.
    if !there.iter().any(|it| Arc::ptr_eq(it, value)) {
        there.push(Arc::clone(value));
    }
}

fn leave<K: Eq + Hash, V>(by: &mut HashMap<K, Vec<Arc<V>>>, key: &K, is_it: impl Fn(&V) -> bool) {
    if let Some(there) = by.get_mut(key) {
        there.retain(|it| !is_it(it));
        if there.is_empty() {
            by.remove(key);
        }
    }
}
