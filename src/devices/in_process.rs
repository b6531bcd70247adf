//! Drivers that run in the daemon's own process: those that never block. Knows drivers only.

use std::{
    future::{Future, pending},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use tokio::task::JoinSet;

use super::{
    DeviceError, Driver,
    call::{self, Call, Engine, Reply, Session, Underway},
};

/// Runs a driver here.
pub struct InProcess<D: Driver>(Box<dyn Fn() -> D::Config + Send + Sync>);

impl<D: Driver> InProcess<D> {
    /// Opens it with what `config` makes, each time anew.
    pub fn new(config: impl Fn() -> D::Config + Send + Sync + 'static) -> Self {
        Self(Box::new(config))
    }
}

impl<D: Driver> Engine for InProcess<D> {
    type Session = Here<D>;

    async fn open(&self) -> Result<Here<D>, DeviceError> {
        let config = (self.0)();
        Ok(Here(Arc::new(D::open(config).await?)))
    }
}

/// A driver in this process. A call ends when its future is dropped.
pub struct Here<D>(Arc<D>);

impl<D: Driver> Session for Here<D> {
    fn lanes(&self) -> usize {
        self.0.lanes()
    }

    fn call(&self, call: Call) -> impl Underway {
        let driver = Arc::clone(&self.0);
        let answer: HereCall = Box::pin(async move {
            // A task of its own: a driver that panics must not take its caller with it, nor one that computes hold it up.
            let mut task = JoinSet::new();
            task.spawn(async move { call::perform(&*driver, call).await });
            match task.join_next().await {
                Some(Ok(result)) => result,
                _ => Err(DeviceError::Restarted),
            }
        });
        answer
    }

    fn died(&self) -> impl Future<Output = String> + Send + 'static {
        pending()
    }

    async fn end(self, _: Duration) {}
}

type HereCall = Pin<Box<dyn Future<Output = Result<Reply, DeviceError>> + Send>>;

impl Underway for HereCall {
    /// It has begun.
    fn withdraw(&self) {}
}
