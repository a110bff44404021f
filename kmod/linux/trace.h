/* SPDX-License-Identifier: GPL-2.0-only */
/* Trace points of a ring: events/vhost_net_mirror in tracefs. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM vhost_net_mirror

#if !defined(VHM_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define VHM_TRACE_H

#include <linux/tracepoint.h>

struct vhm_queue;

DECLARE_EVENT_CLASS(vhm_queue,
	TP_PROTO(const struct vhm_queue *queue),
	TP_ARGS(queue),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(unsigned int, ring)
		__field(u16, avail)
		__field(u16, used)
	),
	TP_fast_assign(
		__entry->device = vhm_number(queue->dev);
		__entry->ring = queue->index;
		__entry->avail = queue->last_avail;
		__entry->used = queue->last_used;
	),
	TP_printk("device=%u ring=%u avail=%u used=%u", __entry->device, __entry->ring,
		  __entry->avail, __entry->used)
);

/* The worker takes a ring up. */
DEFINE_EVENT(vhm_queue, vhm_run,
	TP_PROTO(const struct vhm_queue *queue),
	TP_ARGS(queue)
);

/* The driver is told of used buffers. */
DEFINE_EVENT(vhm_queue, vhm_signal,
	TP_PROTO(const struct vhm_queue *queue),
	TP_ARGS(queue)
);

/* A chain of descriptors was taken from the avail ring. */
TRACE_EVENT(vhm_chain,
	TP_PROTO(const struct vhm_queue *queue, u16 first, int out, int in),
	TP_ARGS(queue, first, out, in),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(unsigned int, ring)
		__field(u16, head)
		__field(int, out)
		__field(int, in)
	),
	TP_fast_assign(
		__entry->device = vhm_number(queue->dev);
		__entry->ring = queue->index;
		__entry->head = first;
		__entry->out = out;
		__entry->in = in;
	),
	TP_printk("device=%u ring=%u head=%u out=%d in=%d", __entry->device, __entry->ring,
		  __entry->head, __entry->out, __entry->in)
);

/* Buffers were published in the used ring. */
TRACE_EVENT(vhm_used,
	TP_PROTO(const struct vhm_queue *queue, u16 count),
	TP_ARGS(queue, count),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(unsigned int, ring)
		__field(u16, used)
		__field(u16, count)
	),
	TP_fast_assign(
		__entry->device = vhm_number(queue->dev);
		__entry->ring = queue->index;
		__entry->used = queue->last_used;
		__entry->count = count;
	),
	TP_printk("device=%u ring=%u used=%u count=%u", __entry->device, __entry->ring,
		  __entry->used, __entry->count)
);

/* ERR was signalled; the cause counts from bad_rings on through struct vhm_stats. */
TRACE_EVENT(vhm_error,
	TP_PROTO(const struct vhm_queue *queue, int cause),
	TP_ARGS(queue, cause),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(unsigned int, ring)
		__field(u16, avail)
		__field(int, cause)
	),
	TP_fast_assign(
		__entry->device = vhm_number(queue->dev);
		__entry->ring = queue->index;
		__entry->avail = queue->last_avail;
		__entry->cause = cause;
	),
	TP_printk("device=%u ring=%u avail=%u cause=%d", __entry->device, __entry->ring,
		  __entry->avail, __entry->cause)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
