//! The verbs, each with what fails without it and what shows that it is back.

use super::Row;
use super::authority::{
    a_lost_authority_is_not_made_again, a_new_root_ends_no_session, lost_roots_stay_lost,
    no_root_is_made, spoilt_roots_stay_so, the_authority_is_kept, the_authority_is_not_followed,
    the_roots_are_written, the_roots_can_not_be_looked_at,
};
use super::destinations::{
    endpoints_are_not_followed, no_pod_is_a_destination, no_service_is_a_destination,
    nothing_is_behind_a_service, pods_are_destinations, pods_are_not_followed,
    services_are_destinations, services_are_not_followed,
};
use super::events::{events_are_made, events_count, no_event_counts, no_event_is_made};
use super::names::{
    a_leader_can_not_go_on, a_lost_map_stays_lost, a_spoilt_map_stays_so,
    names_have_nowhere_to_point, no_leader_is_known, nobody_leads_anew,
    the_map_can_not_be_looked_at, the_map_is_written,
};
use super::nodes::{no_node_is_known, nodes_are_known, nodes_are_not_followed};
use super::peers::{
    other_servers_are_followed, other_servers_are_not_followed, other_servers_are_not_listed,
};
use super::tokens::{a_pod_enrols, no_pod_is_known, no_token_is_known};

pub(super) const ROWS: [Row; 27] = [
    Row {
        verb: "list",
        resource: "nodes",
        role: "corvid-proxy-server",
        breaks: no_node_is_known,
        recovers: nodes_are_known,
    },
    Row {
        verb: "watch",
        resource: "nodes",
        role: "corvid-proxy-server",
        breaks: nodes_are_not_followed,
        recovers: nodes_are_known,
    },
    Row {
        verb: "list",
        resource: "endpointslices",
        role: "corvid-proxy-server-peers",
        breaks: other_servers_are_not_listed,
        recovers: other_servers_are_followed,
    },
    Row {
        verb: "watch",
        resource: "endpointslices",
        role: "corvid-proxy-server-peers",
        breaks: other_servers_are_not_followed,
        recovers: other_servers_are_followed,
    },
    Row {
        verb: "create",
        resource: "leases",
        role: "corvid-proxy-server",
        breaks: nobody_leads_anew,
        recovers: the_map_is_written,
    },
    Row {
        verb: "get",
        resource: "leases",
        role: "corvid-proxy-server",
        breaks: no_leader_is_known,
        recovers: the_map_is_written,
    },
    Row {
        verb: "update",
        resource: "leases",
        role: "corvid-proxy-server",
        breaks: a_leader_can_not_go_on,
        recovers: the_map_is_written,
    },
    Row {
        verb: "get",
        resource: "services",
        role: "corvid-proxy-server",
        breaks: names_have_nowhere_to_point,
        recovers: the_map_is_written,
    },
    Row {
        verb: "create",
        resource: "configmaps",
        role: "corvid-proxy-server",
        breaks: a_lost_map_stays_lost,
        recovers: the_map_is_written,
    },
    Row {
        verb: "get",
        resource: "configmaps",
        role: "corvid-proxy-server",
        breaks: the_map_can_not_be_looked_at,
        recovers: the_map_is_written,
    },
    Row {
        verb: "patch",
        resource: "configmaps",
        role: "corvid-proxy-server",
        breaks: a_spoilt_map_stays_so,
        recovers: the_map_is_written,
    },
    Row {
        verb: "create",
        resource: "secrets",
        role: "corvid-proxy-server-authority",
        breaks: a_lost_authority_is_not_made_again,
        recovers: the_authority_is_kept,
    },
    Row {
        verb: "get",
        resource: "secrets",
        role: "corvid-proxy-server-authority",
        breaks: the_authority_is_not_followed,
        recovers: the_authority_is_kept,
    },
    Row {
        verb: "patch",
        resource: "secrets",
        role: "corvid-proxy-server-authority",
        breaks: no_root_is_made,
        recovers: a_new_root_ends_no_session,
    },
    Row {
        verb: "create",
        resource: "configmaps",
        role: "corvid-proxy-server-authority",
        breaks: lost_roots_stay_lost,
        recovers: the_roots_are_written,
    },
    Row {
        verb: "get",
        resource: "configmaps",
        role: "corvid-proxy-server-authority",
        breaks: the_roots_can_not_be_looked_at,
        recovers: the_roots_are_written,
    },
    Row {
        verb: "patch",
        resource: "configmaps",
        role: "corvid-proxy-server-authority",
        breaks: spoilt_roots_stay_so,
        recovers: the_roots_are_written,
    },
    Row {
        verb: "create",
        resource: "tokenreviews",
        role: "corvid-proxy-server",
        breaks: no_token_is_known,
        recovers: a_pod_enrols,
    },
    Row {
        verb: "list",
        resource: "pods",
        role: "corvid-proxy-server-pods",
        breaks: no_pod_is_a_destination,
        recovers: pods_are_destinations,
    },
    Row {
        verb: "watch",
        resource: "pods",
        role: "corvid-proxy-server-pods",
        breaks: pods_are_not_followed,
        recovers: pods_are_destinations,
    },
    Row {
        verb: "list",
        resource: "services",
        role: "corvid-proxy-server-services",
        breaks: no_service_is_a_destination,
        recovers: services_are_destinations,
    },
    Row {
        verb: "watch",
        resource: "services",
        role: "corvid-proxy-server-services",
        breaks: services_are_not_followed,
        recovers: services_are_destinations,
    },
    Row {
        verb: "list",
        resource: "endpointslices",
        role: "corvid-proxy-server-services",
        breaks: nothing_is_behind_a_service,
        recovers: services_are_destinations,
    },
    Row {
        verb: "watch",
        resource: "endpointslices",
        role: "corvid-proxy-server-services",
        breaks: endpoints_are_not_followed,
        recovers: services_are_destinations,
    },
    Row {
        verb: "get",
        resource: "pods",
        role: "corvid-proxy-server-enrol",
        breaks: no_pod_is_known,
        recovers: a_pod_enrols,
    },
    Row {
        verb: "create",
        resource: "events",
        role: "corvid-proxy-server-events",
        breaks: no_event_is_made,
        recovers: events_are_made,
    },
    Row {
        verb: "patch",
        resource: "events",
        role: "corvid-proxy-server-events",
        breaks: no_event_counts,
        recovers: events_count,
    },
];
