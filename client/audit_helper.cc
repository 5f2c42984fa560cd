#include "client/audit_helper.h"

#include <pthread.h>

#include <utility>

#include "client/grpc_status.h"

namespace clusterkv::client {

AuditHelper::AuditHelper(Send send) : send_(std::move(send)) {
  thread_ = std::thread([this] { Run(); });
  pthread_setname_np(thread_.native_handle(), "ckv-audit");
}

AuditHelper::~AuditHelper() { Stop(); }

void AuditHelper::Submit(AuditSample sample) {
  const std::lock_guard lock(mutex_);
  if (stop_ || queue_.size() >= kMaxQueued) return;
  queue_.push_back(std::move(sample));
  changed_.notify_all();
}

void AuditHelper::Flush(const Deadline& deadline) {
  std::unique_lock lock(mutex_);
  changed_.wait_until(lock, deadline.time(),
                      [this] { return stop_ || (queue_.empty() && !sending_); });
}

void AuditHelper::Stop() {
  if (!thread_.joinable()) return;
  std::deque<AuditSample> dropped;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    dropped.swap(queue_);
    changed_.notify_all();
  }
  thread_.join();
}

void AuditHelper::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    {
      AuditSample sample = std::move(queue_.front());
      queue_.pop_front();
      sending_ = true;
      lock.unlock();
      if (MayHaveHappened(send_(sample.request))) sample.slot.Abandon();
    }
    lock.lock();
    sending_ = false;
    changed_.notify_all();
  }
}

}  // namespace clusterkv::client
