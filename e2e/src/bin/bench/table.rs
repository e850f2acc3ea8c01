//! The table: medians, and their ratios to both splices.

use crate::memory::{IdleSessions, IdleStreams};

/// Figures of one way, by name, in the order in which they were first added.
#[derive(Default)]
pub(crate) struct Samples(Vec<(String, Vec<f64>)>);

impl Samples {
    pub(crate) fn add(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name, vec![value])),
        }
    }

    fn medians(&self) -> Vec<(&str, f64)> {
        let median = |values: &Vec<f64>| {
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
        };
        self.0
            .iter()
            .map(|(name, values)| (name.as_str(), median(values)))
            .collect()
    }
}

/// Prints Markdown.
pub(crate) fn print(results: &[Samples], streams: &IdleStreams, sessions: &IdleSessions) {
    let [plain, tls, corvid, peer] = results else {
        return;
    };
    println!(
        "| median | plain splice | TLS splice | corvid | × plain | × TLS | by a peer | × corvid |"
    );
    println!("| --- | --: | --: | --: | --: | --: | --: | --: |");
    for ((((name, plain), (_, tls)), (_, corvid)), (_, peer)) in plain
        .medians()
        .into_iter()
        .zip(tls.medians())
        .zip(corvid.medians())
        .zip(peer.medians())
    {
        println!(
            "| {name} | {plain:.2} | {tls:.2} | {corvid:.2} | {:.2} | {:.2} | {peer:.2} | {:.2} |",
            corvid / plain,
            corvid / tls,
            peer / corvid
        );
    }
    println!();
    println!("| memory | KiB |");
    println!("| --- | --: |");
    println!(
        "| an idle session at the server (of {}) | {:.1} |",
        sessions.count, sessions.each
    );
    println!(
        "| an idle stream at the server (of {}) | {:.1} |",
        streams.count, streams.server
    );
    println!(
        "| an idle stream at the agent (of {}) | {:.1} |",
        streams.count, streams.agent
    );
}

/// Prints Markdown: what goes by a line beside one splice, and beside nobody.
pub(crate) fn print_line(results: &[Samples]) {
    let [straight, splice, line] = results else {
        return;
    };
    println!(
        "| median | directly | plain splice of one hop | corvid, by a line | × splice | beside directly |"
    );
    println!("| --- | --: | --: | --: | --: | --: |");
    let all = straight.medians().into_iter().zip(splice.medians());
    for (((name, straight), (_, splice)), (_, line)) in all.zip(line.medians()) {
        let (times, beside) = (line / splice, line - straight);
        println!(
            "| {name} | {straight:.2} | {splice:.2} | {line:.2} | {times:.2} | {beside:+.2} |"
        );
    }
    println!();
}
