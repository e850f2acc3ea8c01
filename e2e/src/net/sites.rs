//! The sites that every scenario runs on: a cloud, three edges behind NAT boxes, and the internet between them.

use anyhow::Result;

use super::Net;

impl Net {
    /// Lays the standard sites. `edge1` and `edge2` have the same private address on purpose.
    ///
    /// ```text
    /// cloud 203.0.113.10 --- inet (router) --- nat1 198.51.100.2  --- edge1 192.168.1.10
    ///                                     \--- nat2 198.51.100.10 --- edge2 192.168.1.10
    ///                                     \--- nat3 198.51.100.18 --- edge3 192.168.3.10
    /// ```
    ///
    /// # Errors
    /// When `ip` or `nft` fails.
    pub fn sites() -> Result<Self> {
        let net = Self::new()?;
        let (cloud, inet) = (net.add("cloud")?, net.add("inet")?);
        net.link(
            (&cloud, "wan", "203.0.113.10/24"),
            (&inet, "cloud0", "203.0.113.1/24"),
        )?;
        cloud.ip("route add default via 203.0.113.1")?;
        inet.forward()?;
        for (number, site) in [(1, 1), (2, 1), (3, 3)] {
            // A /29 at the internet side: the box can be given another address of it by its provider.
            let first = (number - 1) * 8;
            let nat = net.add(&format!("nat{number}"))?;
            let edge = net.add(&format!("edge{number}"))?;
            let (router, wan) = (first + 1, format!("198.51.100.{}/29", first + 2));
            net.link(
                (
                    &inet,
                    &format!("nat{number}"),
                    &format!("198.51.100.{router}/29"),
                ),
                (&nat, "wan", &wan),
            )?;
            nat.ip(&format!("route add default via 198.51.100.{router}"))?;
            let (lan, own) = (
                format!("192.168.{site}.1/24"),
                format!("192.168.{site}.10/24"),
            );
            net.link((&nat, "lan", &lan), (&edge, "eth0", &own))?;
            edge.ip(&format!("route add default via 192.168.{site}.1"))?;
            nat.masquerade("wan")?;
        }
        Ok(net)
    }
}
