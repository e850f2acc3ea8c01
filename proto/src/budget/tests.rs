//! What follows from a budget, and who goes over it.

use super::*;

#[test]
fn windows_derive_from_the_budget() {
    for (limit, window) in [
        (256 << 20, 1 << 20),
        (20 << 20, 640 << 10),
        (1 << 20, 64 << 10),
    ] {
        assert_eq!(Budget::new(limit).stream_window(), window);
    }
}

#[tokio::test(start_paused = true)]
async fn over_budget_the_one_that_stopped_longest_goes() {
    let budget = Budget::new(2 << 20);
    let window = u64::from(budget.stream_window());
    let mut all = Vec::new();
    for _ in 0..32 {
        all.push(budget.stopped(window));
        tokio::time::advance(GRACE).await;
    }
    assert_eq!(budget.held(), 32 * window);
    let late = budget.stopped(window);
    all[0].evicted().await;
    assert_eq!(budget.held(), 32 * window);
    assert!(futures_pending(all[1].evicted()).await && futures_pending(late.evicted()).await);
    drop(all);
    drop(late);
    assert_eq!(budget.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_costs_more_makes_more_go() {
    let budget = Budget::new(8 << 20);
    let small: Vec<_> = (0..64).map(|_| budget.stopped(128 << 10)).collect();
    assert_eq!(budget.held(), 8 << 20);
    tokio::time::advance(GRACE).await;
    let large = budget.stopped(384 << 10);
    for gone in &small[..3] {
        gone.evicted().await;
    }
    assert!(futures_pending(small[3].evicted()).await);
    assert_eq!(budget.held(), 8 << 20);
    drop((small, large));
    assert_eq!(budget.held(), 0);
}

#[test]
fn what_else_costs_memory_derives_from_the_budget_too() {
    for (limit, send, read) in [
        (256 << 20, 4 << 20, 64 << 10),
        (20 << 20, 4 << 20, 64 << 10),
        (8 << 20, 2 << 20, 32 << 10),
        (1 << 20, 1 << 20, 8 << 10),
    ] {
        let budget = Budget::new(limit);
        assert_eq!((budget.send_window(), budget.read_buffer()), (send, read));
    }
}

#[tokio::test(start_paused = true)]
async fn many_that_stop_at_once_are_brought_within_the_limit() {
    let budget = Budget::new(2 << 20);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..1000 {
        let stopped = budget.stopped(budget.stream_window().into());
        assert!(budget.held() <= 2 * (2 << 20));
        tasks.spawn(async move { stopped.evicted().await });
    }
    tokio::time::sleep(GRACE * 3).await;
    assert!(budget.held() <= 2 << 20, "{}", budget.held());
}

async fn futures_pending(future: impl Future<Output = ()>) -> bool {
    tokio::time::timeout(Duration::from_millis(1), future)
        .await
        .is_err()
}

#[test]
fn reads_are_small_while_much_waits_for_the_tunnel() {
    let budget = Budget::new(6 << 20);
    assert_eq!(budget.read_buffer(), 24 << 10);
    let little = budget.waiting((768 << 10) - 1);
    assert_eq!(budget.read_buffer(), 24 << 10);
    let more = budget.waiting(1);
    assert_eq!(budget.read_buffer(), SMALL_READ);
    drop(little);
    assert_eq!(budget.read_buffer(), 24 << 10);
    drop(more);
    assert_eq!(budget.0.waiting.load(Ordering::Relaxed), 0);
}

#[test]
fn few_local_connections_have_large_buffers_and_many_small_ones() {
    for (limit, large, small) in [
        (256 << 20, 256 << 10, 87_381),
        (20 << 20, 160 << 10, 54_613),
        (6 << 20, 48 << 10, 16 << 10),
        (1 << 20, 32 << 10, 16 << 10),
    ] {
        let budget = Budget::new(limit);
        let mut first: Vec<_> = (0..ROOMS).map(|_| budget.socket_buffer()).collect();
        assert!(first.iter().all(|buffer| buffer.bytes() == large));
        let all: u64 = first.iter().map(|buffer| u64::from(buffer.cost())).sum();
        assert!(limit < 6 << 20 || all <= limit / 4);
        assert_eq!(budget.socket_buffer().bytes(), small);
        first.pop();
        assert_eq!(budget.socket_buffer().bytes(), large);
    }
}
