//! How often enrolment may be asked for: in all, and from one address. Bounded memory.
//!
//! Agents that show their certificates are counted by themselves: whatever strangers do, and from however many addresses,
//! who is in stays in.

use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};

use crate::identity::Name;

/// Addresses remembered at a time, some 100 bytes each.
const MAX_ADDRESSES: usize = 10_000;

/// Renewals of one agent a minute, also as a burst. A healthy one needs two a day.
const OF_ONE_AGENT: NonZeroU32 = NonZeroU32::new(12).unwrap();

/// What a stranger is told who comes when all addresses are taken: they are forgotten within a minute.
const FULL: Duration = Duration::from_secs(60);

/// How often enrolment and renewal may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnrollLimits {
    /// From one IPv4 address or IPv6 /64, also as a burst. Agents behind one NAT share it.
    pub per_address_per_minute: NonZeroU32,
    /// In all, also as a burst; as often again by agents that show their certificates.
    pub per_second: NonZeroU32,
}

impl Default for EnrollLimits {
    /// 120 a minute: a site of that many agents renews at once after an outage. 50 a second: a tenth of
    /// what one core can sign and sync.
    fn default() -> Self {
        let number = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        Self {
            per_address_per_minute: number(120),
            per_second: number(50),
        }
    }
}

#[derive(Debug)]
pub(super) struct Limiter {
    all: DefaultDirectRateLimiter,
    by_address: DefaultKeyedRateLimiter<IpAddr>,
    agents: DefaultDirectRateLimiter,
    by_agent: DefaultKeyedRateLimiter<Name>,
    clock: DefaultClock,
}

impl Limiter {
    pub(super) fn new(limits: EnrollLimits) -> Self {
        Self {
            all: RateLimiter::direct(Quota::per_second(limits.per_second)),
            by_address: RateLimiter::keyed(Quota::per_minute(limits.per_address_per_minute)),
            agents: RateLimiter::direct(Quota::per_second(limits.per_second)),
            by_agent: RateLimiter::keyed(Quota::per_minute(OF_ONE_AGENT)),
            clock: DefaultClock::default(),
        }
    }

    /// Counts a request of `address`, or says how long it has to wait.
    ///
    /// The address comes first: who asks too often takes nothing away from the others.
    pub(super) fn check(&self, address: IpAddr) -> Result<(), Duration> {
        if self.by_address.len() >= MAX_ADDRESSES {
            self.by_address.retain_recent();
            if self.by_address.len() >= MAX_ADDRESSES {
                return Err(FULL);
            }
        }
        let now = self.clock.now();
        self.by_address
            .check_key(&network(address))
            .map_err(|until| until.wait_time_from(now))?;
        self.all.check().map_err(|until| until.wait_time_from(now))
    }

    /// As [`Limiter::check`], for an agent that has shown its certificate.
    pub(super) fn check_agent(&self, agent: &Name) -> Result<(), Duration> {
        // As many at the most as there are certificates, so there is always room for one.
        if self.by_agent.len() >= MAX_ADDRESSES {
            self.by_agent.retain_recent();
        }
        let now = self.clock.now();
        self.by_agent
            .check_key(agent)
            .and_then(|()| self.agents.check())
            .map_err(|until| until.wait_time_from(now))
    }
}

/// One site: an IPv4 address, or the /64 in which a host picks its IPv6 addresses as it likes.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(
            address.to_bits() & !u128::from(u64::MAX),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(per_minute: u32, per_second: u32) -> Limiter {
        let number = |number| NonZeroU32::new(number).unwrap();
        Limiter::new(EnrollLimits {
            per_address_per_minute: number(per_minute),
            per_second: number(per_second),
        })
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_address_that_asks_too_often_takes_nothing_from_the_others() {
        let limiter = limiter(2, 1000);
        let (greedy, other) = (address("192.0.2.1"), address("192.0.2.2"));
        assert!(limiter.check(greedy).is_ok() && limiter.check(greedy).is_ok());
        let wait = limiter.check(greedy).unwrap_err();
        assert!(
            wait > Duration::ZERO && wait <= Duration::from_secs(30),
            "{wait:?}"
        );
        assert!(limiter.check(other).is_ok());
    }

    #[test]
    fn hosts_of_one_ipv6_network_count_as_one_and_mapped_addresses_as_ipv4() {
        assert_eq!(
            network(address("2001:db8::1")),
            network(address("2001:db8::2:3"))
        );
        assert_ne!(
            network(address("2001:db8::1")),
            network(address("2001:db8:0:1::1"))
        );
        assert_eq!(network(address("::ffff:192.0.2.1")), address("192.0.2.1"));
    }

    #[test]
    fn many_addresses_are_limited_together_and_their_number_is_bounded() {
        let limiter = limiter(1, 1);
        assert!(limiter.check(address("192.0.2.1")).is_ok());
        assert!(limiter.check(address("192.0.2.2")).is_err());
        for index in 0..20_000_u32 {
            limiter
                .check(IpAddr::V4((0x0a00_0000 + index).into()))
                .unwrap_err();
        }
        assert!(limiter.by_address.len() <= MAX_ADDRESSES);
    }

    #[test]
    fn agents_are_counted_by_themselves_and_each_for_itself() {
        let limiter = limiter(1, 100);
        let stranger = address("192.0.2.1");
        limiter.check(stranger).unwrap();
        limiter.check(stranger).unwrap_err();
        let agent = |name: &str| Name::parse(name).unwrap();
        for _ in 0..OF_ONE_AGENT.get() {
            limiter.check_agent(&agent("edge1")).unwrap();
        }
        limiter.check_agent(&agent("edge1")).unwrap_err();
        limiter.check_agent(&agent("edge2")).unwrap();
    }
}
