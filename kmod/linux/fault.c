// SPDX-License-Identifier: GPL-2.0-only
/*
 * Faults on request: fault_copy=100 makes every hundredth operation of that kind
 * fail, 0 none. While all are 0, a patched jump is all that is left of it.
 */
#include <linux/atomic.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include "vhm.h"

DEFINE_STATIC_KEY_FALSE(vhm_faults);

struct fault {
	unsigned int every;
	atomic_t passed;
};

static struct fault faults[PORT_FAULT_SITES];
static DEFINE_MUTEX(faults_lock);

bool vhm_fault(enum port_site site)
{
	unsigned int every = READ_ONCE(faults[site].every);

	return every && !((unsigned int)atomic_inc_return(&faults[site].passed) % every);
}

static int fault_set(const char *text, const struct kernel_param *param)
{
	struct fault *fault = param->arg;
	unsigned int every;
	int error = kstrtouint(text, 0, &every);

	if (error)
		return error;
	mutex_lock(&faults_lock);
	if (every && !fault->every)
		static_branch_inc(&vhm_faults);
	else if (!every && fault->every)
		static_branch_dec(&vhm_faults);
	atomic_set(&fault->passed, 0);
	WRITE_ONCE(fault->every, every);
	mutex_unlock(&faults_lock);
	return 0;
}

static int fault_get(char *text, const struct kernel_param *param)
{
	const struct fault *fault = param->arg;

	return sysfs_emit(text, "%u\n", READ_ONCE(fault->every));
}

static const struct kernel_param_ops fault_ops = {
	.set = fault_set,
	.get = fault_get,
};

module_param_cb(fault_alloc, &fault_ops, &faults[PORT_FAULT_ALLOC], 0600);
MODULE_PARM_DESC(fault_alloc, "Let every n-th allocation fail; 0: none");
module_param_cb(fault_copy, &fault_ops, &faults[PORT_FAULT_COPY], 0600);
MODULE_PARM_DESC(fault_copy, "Let every n-th access to the owner's memory fail; 0: none");
module_param_cb(fault_send, &fault_ops, &faults[PORT_FAULT_SEND], 0600);
MODULE_PARM_DESC(fault_send, "Let every n-th frame find no room in the backend; 0: none");
module_param_cb(fault_receive, &fault_ops, &faults[PORT_FAULT_RECEIVE], 0600);
MODULE_PARM_DESC(fault_receive, "Let every n-th frame be lost on its way in; 0: none");
